"""The DeepSpeed engine of a stage: process group, configuration, and what a library fault needs first (feasibility section 2)."""

import ctypes
import logging
import os
import platform
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vlm.errors import ConfigurationError, EnvironmentProblem, VLMError
from vlm.train.config import StageSpec
from vlm.train.optim import elements

__all__ = ["Engine", "connect", "deepspeed_config", "keep_memory", "precision_of", "together"]

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Of glibc's malloc.h."""


def connect() -> tuple[int, int, torch.device]:
    """Join the process group that torchrun (or nobody: one process) describes. Returns rank, ranks, device."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DEEPSPEED_TIMEOUT", "60")  # minutes that a rank waits for the others: rank 0 alone checks the data, and its library's 10 are few for large sets
    import deepspeed

    if not torch.cuda.is_available():
        keep_memory()
        # On CPU DeepSpeed compiles an all-reduce with the system's compiler at the first initialise, and dies where there is none; gloo does without.
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not dist.is_initialized() and "RANK" not in os.environ:  # one process: no port, and DeepSpeed does not look for MPI
        os.environ.setdefault("LOCAL_RANK", "0")  # the engine insists on it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[reportPrivateImportUsage]
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local >= torch.cuda.device_count():
        raise EnvironmentProblem(
            f"process {local} of this machine has no GPU",
            got=f"{torch.cuda.device_count()} visible",
            cure="start at most one process per GPU, and let each see all GPUs of its node",
        )
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def keep_memory() -> None:
    """Tell glibc to keep the big blocks that it else returns to the kernel and asks for again in every step, at the price of page faults (benchmarks/train_step.py)."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, size in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**30), (M_TOP_PAD, 2**26)):
        libc.mallopt(option, size)


def together(part: Callable[[], None], here: bool = True) -> None:
    """Do a part on the ranks where it is to be done, and raise on all what it raised on one: who went on alone would wait for the others. Called on all ranks; the part calls no other rank."""
    problem: Exception | None = None
    try:
        if here:
            part()
    except Exception as found:
        problem = found
    told = problem if problem is None or isinstance(problem, VLMError) else RuntimeError(f"{type(problem).__name__}: {problem}")  # others may not travel
    first = next((one for one in _gathered(told) if one is not None), None)
    if first is not None:
        raise problem or first


def _gathered(value: Any) -> list[Any]:
    """What each rank has, by rank."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return [value]
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, value)
    return found


def precision_of(asked: str, device: torch.device, zero: int) -> torch.dtype:
    """auto: bf16 on GPUs at ZeRO 1 to 3, else fp32."""
    if asked == "auto":
        asked = "bf16" if device.type == "cuda" and zero else "fp32"
    return torch.bfloat16 if asked == "bf16" else torch.float32


def deepspeed_config(stage: StageSpec, dtype: torch.dtype) -> dict[str, Any]:
    """The stage's DeepSpeed configuration with what must always be written: clipping (absent means 1.0), precision. Raises ConfigurationError for bf16 at ZeRO 0.

    Accumulation is not DeepSpeed's to count: packed steps differ in their number of micro-batches, and `Engine.last` tells it which is the last.
    """
    config = {key: dict(value) if isinstance(value, Mapping) else value for key, value in stage.deepspeed.items()}
    config.setdefault("zero_optimization", {"stage": 0})
    if dtype == torch.bfloat16 and not stage.zero:
        raise ConfigurationError(
            "bf16 at ZeRO 0 rounds differently from ZeRO 1 to 3", got="deepspeed: zero0 with precision bf16", cure="use deepspeed: zero1 or higher, or precision: fp32"
        )
    return config | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": stage.optimizer.clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


BUCKET = 500_000_000
"""DeepSpeed's own `reduce_bucket_size`, in elements."""


def _bucket(optimizer: torch.optim.Optimizer) -> int:
    """Elements of the buffer in which ZeRO collects gradients: no more than there are. DeepSpeed asks for all of it, at ZeRO 1 and 2 in every backward pass: 2 GB in fp32 for the smallest model."""
    return min(BUCKET, sum(elements(group["params"]) for group in optimizer.param_groups))


class Engine:
    """A model under DeepSpeed with the loss divided by what the whole step holds.

    backward takes sums; their divisors are counts over all ranks and micro-batches of the step, so that accumulation and the number of ranks do not change the gradient.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: torch.device):
        import deepspeed

        self.device, self.ranks = device, dist.get_world_size()
        self.peaks = [group["peak"] for group in optimizer.param_groups]
        self.paths = [group["path"] for group in optimizer.param_groups]
        self.model = model
        config = config | {"zero_optimization": {"reduce_bucket_size": _bucket(optimizer), **config["zero_optimization"]}}
        self.inner: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
        self._norm: float | None = None
        self._norm_is_ours = not self.inner.zero_optimization() and not self.inner.bfloat16_enabled()

    def last(self, last: bool) -> None:
        """Called before each micro-batch: whether it is the last of its step. Gradients are reduced and the optimizer acts behind the last one."""
        self.inner.set_gradient_accumulation_boundary(last)

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        return self.inner(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """loss: this micro-batch's share of the step's loss, sums over global counts. DeepSpeed takes the mean over ranks, so the number of ranks goes in."""
        self.inner.backward(loss * self.ranks, scale_wrt_gas=False)

    def step(self) -> None:
        """After every micro-batch; acts at the last of a step."""
        if self._norm_is_ours and self.inner.is_gradient_accumulation_boundary():
            self._norm = float(nn.utils.get_total_norm([parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]))
        self.inner.step()

    def set_rates(self, factor: float) -> None:
        for group, peak in zip(self.inner.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    def gradient_norm(self) -> float | None:
        """Global, before clipping. DeepSpeed gives none at ZeRO 0 in fp32."""
        norm = self._norm if self._norm_is_ours else self.inner.get_global_grad_norm()
        return None if norm is None else float(norm)

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over all ranks, in double precision. Called on all ranks, with the same names in the same order."""
        if self.ranks == 1:
            return dict(values)
        packed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(packed)
        return dict(zip(values, packed.tolist(), strict=True))

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, by rank. Called on all ranks."""
        return _gathered(value)

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank. Called on all ranks."""
        return bool(self.sum({"flag": float(flag)})["flag"])

    def save(self, folder: str, tag: str) -> None:
        """Trained weights, buffers and optimizer. Frozen weights stay out."""
        state = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}  # so that DeepSpeed can convert it for another number of ranks
        try:
            self.inner.save_checkpoint(folder, tag=tag, client_state=state, save_latest=False, exclude_frozen_parameters=True)
        except Exception:
            dist.barrier()  # with which DeepSpeed ends where all goes well, and where the other ranks wait
            raise

    def load(self, folder: str, tag: str) -> None:
        found, _ = self.inner.load_checkpoint(folder, tag=tag, load_module_strict=False)
        if found is None:
            raise EnvironmentProblem(f"DeepSpeed finds no checkpoint in {folder}/{tag}", cure="resume from an older step, by removing this folder")
