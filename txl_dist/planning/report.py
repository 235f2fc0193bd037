"""Print a plan on one screen, or as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, fields
from textwrap import wrap
from typing import Any

from rich.console import Group
from rich.filesize import decimal
from rich.table import Table

from txl_dist.models.layers.dropout import HAS_TRITON
from txl_dist.planning.communication import KINDS
from txl_dist.planning.memory import Memory
from txl_dist.planning.planner import Plan
from txl_dist.planning.time import StepTime
from txl_dist.planning.totals import totals

WIDTH = 100
PLACES = [field.name for field in fields(Memory) if field.name != "host"]


def report(plan: Plan, other: Plan) -> Group:
    """Return all that people want to know of a plan.

    Args:
        other: the same with activation checkpointing if the plan is without, or without it; to compare memory.
    """
    return Group(
        *heading(plan),
        "",
        memory_table(plan, other),
        "",
        time_table(plan),
        "",
        sent_table(plan),
        "",
        *conclusions(plan),
        "",
        *assumptions(plan),
    )


def heading(plan: Plan) -> Iterator[str]:
    """Yield what is planned, and under which split."""
    job = plan.job
    split = plan.split
    engine = job.engine
    yield (
        f"{job.model.name}, {plan.num_parameters:,} parameters, vocabulary of {plan.dataset.vocab_size:,} "
        f"({plan.dataset.source})"
    )
    devices = f"{split.ranks} x {job.device}" + (f" ({job.nodes} machines of {job.gpus})" if job.nodes > 1 else "")
    yield (
        f"{devices}, {plan.precision}, attention by {plan.backend}, ZeRO {engine.zero_stage}, offload {engine.offload}"
    )
    stages = f" in {split.stages} stages of {'+'.join(map(str, plan.stage_layers))} layers" if split.stages > 1 else ""
    yield (
        f"{split.num_lanes} lanes = {split.data_parallel} data-parallel x {split.accumulation} micro-batches x "
        f"{split.micro_batch} rows{stages}"
    )
    if job.device != "cpu" and not HAS_TRITON:
        yield "Triton is not installed here: memory and time are those of another backend of attention."


def shown_stages(plan: Plan) -> list[int]:
    """Return the stages that a screen has room for: the first, the last, and of the others the fullest."""
    last = len(plan.memory) - 1
    middle = sorted(range(1, last), key=lambda number: plan.memory[number].total)[-2:]
    return sorted({0, *middle, last})


def memory_table(plan: Plan, other: Plan) -> Table:
    """Return the memory of a rank of each stage at its peak, and with the other choice of checkpointing."""
    table = numbers_table("per rank, GiB", "recompute", *PLACES, "total", "fits")
    usable = plan.rates.usable_memory
    for number in shown_stages(plan):
        for one in (plan, other):
            memory = one.memory[number]
            sizes = [f"{getattr(memory, place) / 2**30:.2f}" for place in PLACES]
            label = f"stage {number}" if len(plan.memory) > 1 else ""
            checkpointing = "on" if one.job.engine.activation_checkpointing else "off"
            if one is plan:
                checkpointing += " *"
            fits = "yes" if memory.total <= usable else "NO"
            table.add_row(label, checkpointing, *sizes, f"{memory.total / 2**30:.2f}", fits)
    return table


def time_table(plan: Plan) -> Table:
    """Return the milliseconds of a step, by what they are spent on."""
    names = [field.name for field in fields(StepTime)]
    table = numbers_table("a step, ms", *names, "total")
    times = [getattr(plan.time, name) for name in names]
    table.add_row("", *(f"{1000 * seconds:,.1f}" for seconds in (*times, plan.time.total)))
    table.add_row("", *(f"{seconds / plan.time.total:.0%}" for seconds in times), "")
    return table


def sent_table(plan: Plan) -> Table:
    """Return the megabytes that a rank of each stage sends in a step."""
    table = numbers_table("sent per step, MB", *KINDS, "total")
    for number in shown_stages(plan):
        sizes = plan.sent[number]
        label = f"stage {number}" if len(plan.memory) > 1 else ""
        table.add_row(label, *(f"{sizes[kind] / 1e6:,.1f}" for kind in KINDS), f"{sum(sizes.values()) / 1e6:,.1f}")
    return table


def numbers_table(*columns: str) -> Table:
    """Return an empty table of numbers."""
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def conclusions(plan: Plan) -> Iterator[str]:
    """Yield what the whole run takes, and what limits it."""
    total = totals(plan)
    step = plan.time.total
    fullest = max(memory.total for memory in plan.memory)
    yield (
        f"predicted      {plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%}, {plan.flops / 1e12:,.2f} TFLOP "
        f"per step of {plan.job.tokens_per_step:,} tokens"
    )
    if plan.split.stages > 1:
        micro_batches, stages = plan.split.accumulation, plan.split.stages
        bubble = (stages - 1) / (micro_batches + stages - 1)
        yield f"bubble         {bubble:.0%} of the pipeline's time, with {micro_batches} micro-batches"
    epochs = "" if total.epochs is None else f", {total.epochs:,.1f} epochs"
    yield (
        f"to the end     {plan.job.train.max_steps:,} steps, {total.tokens:,} tokens{epochs}: "
        f"{duration(total.seconds)}, {total.kwh:,.1f} kWh"
    )
    yield (
        f"a checkpoint   {decimal(round(total.checkpoint))}, written in {duration(total.save)} while training goes on; "
        f"it waits {total.pause:.2g} s"
    )
    if not plan.fits:
        limit = f"memory: {fullest / 2**30:.1f} GiB of {plan.rates.usable_memory / 2**30:.1f} that tensors can fill"
    else:
        limit = f"{plan.time.limit}, {getattr(plan.time, plan.time.limit) / step:.0%} of a step"
    yield f"limited by     {limit}"


def assumptions(plan: Plan) -> Iterator[str]:
    """Yield the assumptions, by the keys that change them."""
    assume = asdict(plan.job.assume)
    rates = plan.rates
    given = ", ".join(f"{key}={value:g}" for key, value in assume.items() if value is not None)
    yield (
        f"assumed of a device: {rates.peak / 1e12:,.4g} TFLOP/s, {rates.usable_memory / 2**30:.1f} GiB for tensors, "
        f"and in use {rates.bandwidth / 1e9:,.0f} GB/s of memory,"
    )
    yield f"  {rates.link / 1e9:,.3g} GB/s between devices, {rates.network / 1e9:,.3g} GB/s between machines;"
    yield from wrap(f"assume.*: {given}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    if plan.job.measured:
        yield f"  the times are {plan.slowdown:.3g} times as long, as {plan.job.measured} has measured"


def search_report(plans: list[Plan], command: str) -> Group:
    """Return the best splits, and how to train by the first."""
    columns = (
        "stages",
        "data-parallel",
        "ZeRO",
        "micro-batches",
        "recompute",
        "offload",
        "GiB",
        "ms",
        "tokens/s",
        "limit",
    )
    table = numbers_table("", *columns)
    for place, plan in enumerate(plans, 1):
        engine = plan.job.engine
        split = [plan.split.stages, plan.split.data_parallel, engine.zero_stage]
        split.append(plan.split.accumulation)
        fullest = max(memory.total for memory in plan.memory) / 2**30
        speed = [f"{1000 * plan.time.total:,.1f}", f"{plan.tokens_per_second:,.0f}", plan.time.limit]
        recompute = "on" if engine.activation_checkpointing else "off"
        table.add_row(str(place), *map(str, split), recompute, engine.offload, f"{fullest:.1f}", *speed)
    best = plans[0]
    first, *_ = heading(best)
    devices = f"{best.split.ranks} x {best.job.device}, {best.precision}, {best.split.num_lanes} lanes; all predicted"
    return Group(first, devices, "", table, "", *assumptions(best), "", "train by the first:", f"  {command}")


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} seconds"


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as one JSON object; bytes, seconds and FLOPs."""
    return {
        "parameters": plan.num_parameters,
        "precision": plan.precision,
        "attention": plan.backend,
        "ranks": plan.split.ranks,
        "data_parallel": plan.split.data_parallel,
        "micro_batch": plan.split.micro_batch,
        "engine": asdict(plan.job.engine),
        "stage_layers": plan.stage_layers,
        "memory": [asdict(memory) | {"total": memory.total} for memory in plan.memory],
        "usable_memory": plan.rates.usable_memory,
        "fits": plan.fits,
        "sent": plan.sent,
        "flops": plan.flops,
        "step": asdict(plan.time) | {"total": plan.time.total},
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "limit": plan.time.limit if plan.fits else "memory",
        **asdict(totals(plan)),
    }
