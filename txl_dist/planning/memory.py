"""The memory of one rank, as DeepSpeed 0.19 and the engine use it: what stays, and the most that there is at once.

    ZeRO 0 (fp32)   weights, gradients and the optimizer's states are whole on every rank
    ZeRO 1, 2       weights are whole; a rank has its share of the fp32 weights and the states. Gradients are copied
                    into a bucket, reduced, and kept for the share: at 1 they are all there until backward has ended
    ZeRO 3          a rank has its share of everything, and gathers the weights that it computes with

N parameters of b bytes each, on R data-parallel ranks; the moments of a step stand in `moments`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from txl_dist.config.schema import TrainJob
from txl_dist.planning.trace import PartTrace

BUCKET = 500_000_000  # parameters: reduce_bucket_size, and elements_per_buffer at ZeRO 0
REUSE = 1_000_000_000  # parameters: ZeRO 3 keeps gathered weights that are used again before so many others are
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Stage:
    """What one rank computes: some parts of the model, on its lanes.

    Attributes:
        parts: of a micro-batch.
        in_flight: micro-batches whose activations are kept at once.
        micro_batches: of a step.
        data_parallel: ranks that share the optimizer's states.
        is_pipeline: whether there are other stages.
    """

    parts: Sequence[PartTrace]
    in_flight: int
    micro_batches: int
    data_parallel: int
    is_pipeline: bool

    @property
    def num_parameters(self) -> int:
        """Return how many parameters this rank computes with; those of two parts count once."""
        return sum({name: size for part in self.parts for name, size in part.parameters.items()}.values())

    def parameters_up_to(self) -> list[int]:
        """Return how many parameters the parts up to each one have together."""
        names: dict[str, int] = {}
        return [sum((names := names | part.parameters).values()) for part in self.parts]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at some moment, by what they are for.

    Attributes:
        weights: that the model computes with.
        optimizer: fp32 weights where the others are not, and the optimizer's states.
        buffers: in which gradients are reduced and updates prepared.
        host: in the CPU's memory, where something is offloaded.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    states: int = 0
    buffers: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Return the bytes on the device."""
        return sum((self.weights, self.gradients, self.optimizer, self.activations, self.states, self.buffers))


def peak_memory(job: TrainJob, stage: Stage, precision: str, on_gpu: bool) -> Memory:
    """Return the memory of a rank at the moment of a step when it is largest."""
    return max(moments(job, stage, precision, on_gpu), key=lambda memory: memory.total)


def moments(job: TrainJob, stage: Stage, precision: str, on_gpu: bool) -> Iterator[Memory]:
    """Yield the memory of a rank in the forward and the backward of each part, in the reduction and in the update."""
    zero = job.engine.zero_stage
    b = BYTES[precision]
    N = stage.num_parameters
    share = -(-N // stage.data_parallel)
    averaged = 4 * share if job.optimizer.average_from is not None else 0
    fp32_weights = 0 if zero == 0 or (zero == 3 and b == 4) else 4 * share
    optimizer = (
        fp32_weights + (8 * N if zero == 0 else 8 * share) + (averaged if zero else averaged * stage.data_parallel)
    )
    host = 0
    if job.engine.offload != "none":
        host = optimizer + 4 * share + b * share  # with the gradients, and weights on their way back
        optimizer = 0
    weights = b * (N if zero < 3 else share)
    if job.engine.offload == "parameters":
        host += weights
        weights = 0
    states = stage_states(stage)
    # An operating system gives memory when it is written: a CPU's bucket is as large as what is copied into it.
    bucket = 0 if zero == 0 else b * (BUCKET if on_gpu else min(N, BUCKET))
    flat = b * min(N, BUCKET) if stage.data_parallel > 1 or zero else 0  # a copy of the bucket, which is sent
    kept = b * share if zero == 3 or (zero == 2 and stage.micro_batches > 1) else 0
    up_to = stage.parameters_up_to()
    held_before = [0, *accumulate(part.held for part in stage.parts)]
    others = (stage.in_flight - 1) * held_before[-1]
    accumulated = zero < 2 and (stage.micro_batches > 1 or stage.is_pipeline)
    pending = 0

    for number in reversed(range(len(stage.parts))):
        part = stage.parts[number]
        before = up_to[number - 1] if number else 0
        own = b * sum(part.parameters.values())
        gathered = b * min(up_to[number], REUSE) if zero == 3 else 0
        if accumulated:
            gradients = b * N + own
        elif zero < 2:
            gradients = b * (N - before)
        else:
            gradients = kept + own
        activations = others + held_before[number] + part.backward_peak + pending
        in_use = bucket
        if not on_gpu and zero < 3:  # whose bucket is a new one in each step
            in_use = b * min(N - up_to[number], BUCKET) if zero == 2 else 0
        yield Memory(weights + gathered, gradients, optimizer, activations, states, in_use, host)
        if number == len(stage.parts) - 1:
            new_states = 0 if stage.is_pipeline else sum(part.state - part.state_held for part in stage.parts)
            activations = others + held_before[number] + part.forward_peak + new_states
            gradients = b * N if accumulated else kept
            yield Memory(weights + gathered, gradients, optimizer, activations, states, 0, host)
            pending = max(0, part.pending - stage.parts[number - 1].carry[0]) if len(stage.parts) > 1 else 0
    all_gradients = {0: b * N, 1: b * share + b * max(0, N - BUCKET), 2: kept + b * share, 3: kept}[zero]
    yield Memory(weights, all_gradients, optimizer, 0, states, bucket + flat, host)
    if zero:
        update = b * share + (0 if b == 4 else 4 * share)
        always = bucket if zero == 3 else 0
        yield Memory(weights, b * share, optimizer, 0, states, always + update, host)


def stage_states(stage: Stage) -> int:
    """Return the bytes of the lanes' states, which are there twice: those that are read and those that are written."""
    states = stage.micro_batches * sum(part.state for part in stage.parts)
    # Those of a micro-batch that has all lanes are not copied: an activation that is the same tensor is one.
    is_kept = stage.micro_batches == 1 and not stage.is_pipeline
    return 2 * states - (sum(part.state_held for part in stage.parts) if is_kept else 0)
