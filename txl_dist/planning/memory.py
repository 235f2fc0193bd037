"""The memory of one rank, as DeepSpeed 0.19 and the engine use it: what stays, and the most that there is at once.

    ZeRO 0 (fp32)   weights, gradients and the optimizer's states are whole on every rank
    ZeRO 1, 2       weights are whole; a rank has its share of the fp32 weights and the states. Gradients are copied
                    into a bucket, reduced, and kept for the share: at 1 they are all there until backward has ended
    ZeRO 3          a rank has its share of everything, and gathers the weights that it computes with

N parameters of b bytes each; the moments of a step, of which the largest counts, are methods of `Accounts`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from txl_dist.config.schema import TrainJob
from txl_dist.models.base import DTYPES
from txl_dist.planning.trace import PartTrace

BUCKET = 500_000_000  # parameters: reduce_bucket_size, and elements_per_buffer at ZeRO 0
REUSE = 1_000_000_000  # parameters: ZeRO 3 keeps gathered weights that are used again before so many others are


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
    accounts = Accounts(job, stage, precision, on_gpu)
    moments = [*accounts.in_backward(), accounts.in_forward(), accounts.in_reduction(), accounts.in_update()]
    return max(moments, key=lambda memory: memory.total)


class Accounts:
    """What a rank has in memory at the moments of a step.

    Attributes:
        always: what is there at each of them.
        zero: the stage of ZeRO.
        b: bytes of a parameter and of its gradient.
        N, share: parameters of the rank's stage, and those that it updates.
        bucket: bytes of gradients that are sent together.
        kept: bytes of gradients that are kept for the update while backward goes on.
        accumulates: whether all gradients are there from the first micro-batch on.
    """

    def __init__(self, job: TrainJob, stage: Stage, precision: str, on_gpu: bool):
        self.stage = stage
        self.on_gpu = on_gpu
        self.zero = job.engine.zero_stage
        self.b = DTYPES[precision].itemsize
        self.N = stage.num_parameters
        self.share = -(-self.N // stage.data_parallel) if self.zero else self.N
        # An operating system gives memory when it is written: a CPU's bucket is as large as what is copied into it.
        self.bucket = self.b * (BUCKET if on_gpu else min(self.N, BUCKET)) if self.zero else 0
        has_partition = self.zero == 3 or (self.zero == 2 and stage.micro_batches > 1)
        self.kept = self.b * self.share if has_partition else 0
        self.accumulates = self.zero < 2 and (stage.micro_batches > 1 or stage.is_pipeline)
        self.up_to = stage.parameters_up_to()
        self.held = [0, *accumulate(part.held for part in stage.parts)]
        self.others_held = (stage.in_flight - 1) * self.held[-1]
        self.always = self._always(job)

    def _always(self, job: TrainJob) -> Memory:
        """Return weights, optimizer and states, on the device or where they are offloaded to."""
        is_master = self.zero == 0 or (self.zero == 3 and self.b == 4)  # the weights are what the optimizer updates
        copies = 2 + (not is_master) + (job.optimizer.average_from is not None)
        weights = self.b * (self.share if self.zero == 3 else self.N)
        optimizer = 4 * copies * self.share
        host = 0
        if job.engine.offload != "none":
            host = optimizer + (4 + self.b) * self.share  # with gradients, and weights on their way back
            optimizer = 0
        if job.engine.offload == "parameters":
            host += weights
            weights = 0
        return Memory(weights=weights, optimizer=optimizer, states=stage_states(self.stage), host=host)

    def _gathered(self, number: int) -> int:
        """Return the bytes of the weights that ZeRO 3 has gathered when a part computes."""
        return self.b * min(self.up_to[number], REUSE) if self.zero == 3 else 0

    def in_backward(self) -> Iterator[Memory]:
        """Yield the memory when each part's backward needs most, the last part's first."""
        last = len(self.stage.parts) - 1
        for number in reversed(range(last + 1)):
            part = self.stage.parts[number]
            own = self.b * sum(part.parameters.values())
            later = self.N - self.up_to[number]  # parameters whose gradients are there
            if self.accumulates:
                gradients = self.b * self.N + own
            elif self.zero < 2:
                gradients = self.b * (later + sum(part.parameters.values()))
            else:
                gradients = self.kept + own
            buffers = self.bucket
            if not self.on_gpu and self.zero < 3:  # which has a new bucket in each step
                buffers = self.b * min(later, BUCKET) if self.zero == 2 else 0
            pending = 0 if number == last else max(0, self.stage.parts[last].pending - part.carry[0])
            yield replace(
                self.always,
                weights=self.always.weights + self._gathered(number),
                gradients=gradients,
                activations=self.others_held + self.held[number] + part.backward_peak + pending,
                buffers=buffers,
            )

    def in_forward(self) -> Memory:
        """Return the memory when the forward of the last part needs most."""
        last = len(self.stage.parts) - 1
        part = self.stage.parts[last]
        new_states = 0 if self.stage.is_pipeline else sum(part.state - part.state_held for part in self.stage.parts)
        return replace(
            self.always,
            weights=self.always.weights + self._gathered(last),
            gradients=self.b * self.N if self.accumulates else self.kept,
            activations=self.others_held + self.held[last] + part.forward_peak + new_states,
            buffers=self.bucket if self.zero == 3 else 0,
        )

    def in_reduction(self) -> Memory:
        """Return the memory when gradients are sent: a copy of the bucket, which is gone when the share is copied."""
        is_sent = self.zero > 0 or self.stage.data_parallel > 1
        copy = self.b * min(self.N, BUCKET) if is_sent else 0
        if self.zero in (1, 2):
            copy = max(copy, self.b * self.share)
        unsent = {0: self.N, 1: max(0, self.N - BUCKET)}.get(self.zero, 0)
        return replace(self.always, gradients=self.kept + self.b * unsent, buffers=self.bucket + copy)

    def in_update(self) -> Memory:
        """Return the memory when the optimizer updates: under ZeRO with a flat copy of gradients, in fp32."""
        if self.zero == 0:
            return replace(self.always, gradients=self.b * self.N)
        copy = self.b * self.share + (0 if self.b == 4 else 4 * self.share)
        bucket = self.bucket if self.zero == 3 else 0
        return replace(self.always, gradients=self.b * self.share, buffers=bucket + copy)


def stage_states(stage: Stage) -> int:
    """Return the bytes of the lanes' states, which are there twice: those that are read and those that are written."""
    states = stage.micro_batches * sum(part.state for part in stage.parts)
    # Those of a micro-batch that has all lanes are not copied: an activation that is the same tensor is one.
    is_kept = stage.micro_batches == 1 and not stage.is_pipeline
    return 2 * states - (sum(part.state_held for part in stage.parts) if is_kept else 0)
