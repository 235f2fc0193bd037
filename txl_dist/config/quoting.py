"""Quote commands that are printed for a user to paste, so that the shell and Hydra read what was meant."""

import re
import shlex

# A path without these is taken literally (overrides.py); with one it may mean something in Hydra's grammar.
GRAMMAR = re.compile(r"""^\Z|^[\s'"\[{~]|\s\Z|[\\,(]|\$\{|^null\Z|^\?+\Z""", re.IGNORECASE)


def quote_for_hydra(text: str) -> str:
    """Quote a text for Hydra's grammar; an interpolation, `${...}`, stays one."""
    # Only backslashes before a quote, or at the end, must be doubled.
    escaped = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"


def escape_interpolations(text: str) -> str:
    """Escape `${`, which OmegaConf would resolve."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def quote_for_shell(word: str) -> str:
    """Quote a word for the shell; in double quotes if it holds single ones and nothing that the shell expands."""
    return f'"{word}"' if "'" in word and not re.search(r'["$`\\!]', word) else shlex.quote(word)


def command_to_paste(program: str, *words: str, **values: object) -> str:
    """Return the shell command `program WORDS KEY=VALUE...`; `__` in the name of a value is a dot of its key."""
    overrides = []
    for key, value in values.items():
        text = str(value)
        if GRAMMAR.search(text):
            text = quote_for_hydra(escape_interpolations(text))
        overrides.append(f"{key.replace('__', '.')}={text}")
    return " ".join([program, *map(quote_for_shell, [*words, *overrides])])
