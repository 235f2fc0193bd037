"""The learning curve of a run as a picture."""

from pathlib import Path
from typing import Any

from txl_dist.files.atomic import atomic_file
from txl_dist.tracking.dashboard.thinning import smooth


def draw_curve(run_dir: str, lines: list[dict[str, Any]]) -> Path:
    """Draw the training and validation loss of a run over its tokens into RUN_DIR/curve.png, and return its path.

    The training loss as it was logged is a faint line, its mean over nearby lines a strong one. A loss that is not
    finite leaves a gap.

    Raises:
        Exception: whatever matplotlib raises, which has files and settings of its own.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles: dict[str, dict[str, Any]] = {
        "train/loss": {"color": "#2f6fde", "label": "training"},
        "valid/loss": {"color": "#c93a52", "marker": "o", "markersize": 4, "label": "validation"},
    }
    figure, axes = pyplot.subplots(figsize=(8, 4.5), constrained_layout=True)
    for key, style in styles.items():
        tokens = [line["tokens"] / 1e6 for line in lines if key in line]
        losses = [line[key] for line in lines if key in line]
        smoothed = smooth(losses) if key == "train/loss" else losses
        if smoothed is not losses:
            axes.plot(tokens, losses, color=style["color"], linewidth=0.8, alpha=0.35)
        if losses:
            axes.plot(tokens, smoothed, linewidth=2, **style)
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)")
    name = Path(run_dir).name.encode(errors="backslashreplace").decode()  # a font has no lone surrogates
    axes.set_title(name, parse_math=False)  # a dollar sign is not TeX
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    target = Path(run_dir) / "curve.png"
    try:
        with atomic_file(target) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
    finally:
        pyplot.close(figure)
    return target
