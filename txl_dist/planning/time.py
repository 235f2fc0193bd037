"""How long a step takes: products of matrices at a share of the peak, all else at a share of the memory's bandwidth.

a micro-batch   products / (peak x product_share) + bytes / (bandwidth x bandwidth_share), by stage
                or as long as the CPU takes to launch its operators, where that is longer
a step          all micro-batches through the slowest stage, and the others' idle time; then what is sent and cannot
                hide behind the computation, and the update of the weights
"""

from dataclasses import asdict, dataclass, fields

from txl_dist.config.schema import PlanJob
from txl_dist.data.lanes import LaneSplit
from txl_dist.models.base import DTYPES
from txl_dist.models.layers.cost import Product
from txl_dist.planning.communication import KINDS
from txl_dist.planning.memory import Stage
from txl_dist.tracking.gpu_peak import PRECISIONS, device_named

# Bytes read and written for each parameter that a rank updates: Adam reads four numbers and writes three.
UPDATE = 28
# As many times a rank reads or writes each gradient and weight before and after: into the bucket, out of it, the norm,
# the division, the flat copy, the cast.
COPIES = 10


@dataclass(frozen=True)
class Rates:
    """What devices and network can do, per second: FLOPs and bytes; memory in bytes.

    Attributes:
        peak: of products in the run's precision; products: what they reach.
        bandwidth, link, network: what is reached of a device's memory, of the links within a machine, and of the
            network of a machine.
        host: between a device and the memory of its machine.
        usable_memory: of a device.
        watts: of all devices and machines.
    """

    peak: float
    products: float
    bandwidth: float
    link: float
    network: float
    host: float
    usable_memory: float
    watts: float


def rates(job: PlanJob, precision: str) -> Rates:
    """Return the rates of a job's devices, as its `assume` has them or else the table of devices."""
    assume = job.assume
    device = device_named(job.device)
    # A key that is not given has its figure in the table: device_is_known has checked it.
    published = dict(zip(PRECISIONS, device.tflops, strict=True))[precision] if device else None
    tflops = assume.tflops or job.engine.peak_tflops or published or 0.0
    memory = assume.memory or (device.memory if device else 0.0)
    bandwidth = assume.bandwidth or (device.bandwidth if device else 0.0)
    link = assume.link or (device.link if device else 0.0)
    watts = assume.watts or (device.watts if device else 0.0)
    return Rates(
        peak=tflops * 1e12,
        products=tflops * 1e12 * assume.product_share,
        bandwidth=bandwidth * 1e9 * assume.bandwidth_share,
        link=link * 1e9 * assume.network_share,
        network=assume.network * 1e9 * assume.network_share,
        host=assume.host * 1e9,
        usable_memory=memory * 2**30 * assume.memory_share,
        watts=job.nodes * (job.gpus * watts + assume.node_watts),
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what a rank of the slowest stage does then.

    Attributes:
        products: of matrices.
        memory: everything else that is computed.
        launches: waiting for the CPU to launch operators.
        idle: waiting for the other stages.
        gradients, weights, carries: sending them.
        update: of the weights.
    """

    products: float
    memory: float
    launches: float
    idle: float
    gradients: float
    weights: float
    carries: float
    update: float

    @property
    def total(self) -> float:
        """Return the seconds of a step."""
        return sum(asdict(self).values())

    @property
    def limit(self) -> str:
        """Return what takes most of it."""
        return max(fields(self), key=lambda field: getattr(self, field.name)).name

    def slowed(self, times: float) -> "StepTime":
        """Return the same where everything takes so many times as long."""
        return StepTime(**{name: seconds * times for name, seconds in asdict(self).items()})


def step_time(
    job: PlanJob,
    split: LaneSplit,
    stages: list[Stage],
    work: list[list[Product]],
    sent: list[dict[str, float]],
    rates: Rates,
    precision: str,
) -> StepTime:
    """Return how long a step takes.

    Args:
        work: the products of each stage, for a micro-batch.
        sent: by each stage's ranks, by kind.
    """
    recomputes = job.engine.activation_checkpointing
    computing = []
    for stage, products in zip(stages, work, strict=True):
        flops = sum(product.training + (product.forward if recomputes else 0) for product in products)
        moved = sum(part.forward_moved + part.backward_moved for part in stage.parts)
        in_products = flops / rates.products
        in_memory = moved / rates.bandwidth
        launching = job.assume.launch * 1e-6 * sum(part.operators for part in stage.parts)
        computing.append((in_products, in_memory, max(0.0, launching - in_products - in_memory)))
    slowest = max(range(len(stages)), key=lambda number: sum(computing[number]))
    in_products, in_memory, waiting = (seconds * split.accumulation for seconds in computing[slowest])
    idle = (split.stages - 1) * sum(computing[slowest])
    messages = {kind: max(of_stage[kind] for of_stage in sent) for kind in KINDS}
    ring = ring_rate(job, split, rates)
    gradients = messages["gradients"] / ring + messages["tied gradients"] / hop_rate(job, split, rates)
    weights = messages["weights"] / ring
    if job.engine.zero_stage == 3:  # which gathers ahead, and reduces, while it computes
        hidden = in_products + in_memory + waiting
        shown = max(0.0, gradients + weights - hidden)
        gradients, weights = (shown * part / (gradients + weights or 1) for part in (gradients, weights))
    carries = (messages["carries"] + messages["carry gradients"]) / hop_rate(job, split, rates)
    update = update_time(job, stages, rates, precision)
    return StepTime(in_products, in_memory, waiting, idle, gradients, weights, carries, update)


def update_time(job: PlanJob, stages: list[Stage], rates: Rates, precision: str) -> float:
    """Return how long the optimizer takes for the parameters of the largest stage."""
    parameters = max(stage.num_parameters for stage in stages)
    ranks = stages[0].data_parallel
    share = parameters / (ranks if job.engine.zero_stage else 1)
    b = DTYPES[precision].itemsize
    copied = COPIES * b * parameters / rates.bandwidth
    if job.engine.offload != "none":
        return copied + (UPDATE + 2 * b) * share / rates.host
    return copied + UPDATE * share / rates.bandwidth


def ring_rate(job: PlanJob, split: LaneSplit, rates: Rates) -> float:
    """Return the bytes per second at which a rank sends to its data-parallel neighbour, the rank after it."""
    ranks = split.data_parallel
    if ranks <= job.gpus and job.gpus % ranks == 0:
        return rates.link
    rings = max(1, job.gpus // ranks)  # which leave a machine together
    return min(rates.link, rates.network / rings)


def hop_rate(job: PlanJob, split: LaneSplit, rates: Rates) -> float:
    """Return the bytes per second at which a rank sends to the next stage, whose ranks come after all of its own."""
    crosses = any(
        rank // job.gpus != (rank + split.data_parallel) // job.gpus
        for rank in range(split.ranks - split.data_parallel)
    )
    leaving = min(job.gpus, split.data_parallel)
    return min(rates.link, rates.network / leaving) if crosses else rates.link
