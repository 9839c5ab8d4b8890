"""How long and in what way a run executes: steps, batches, precision, engine, memory."""

from __future__ import annotations

from dataclasses import dataclass

from .info import setting

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
ENGINES = ("auto", "eager", "fused", "captured")
ATTENTIONS = ("auto", "sdpa", "xformers", "plain")
STORAGES = ("as_is", "fp8", "int8", "nf4")
MEMORY = ("auto", "off")
DIVERGENCE = ("rollback", "stop")


@dataclass(frozen=True, kw_only=True)
class RunningSettings:
    """How long and in what way a run executes: steps, batches, precision, engine, memory."""

    max_train_steps: int = setting(1600, "Number of optimizer steps.", minimum=1, maximum=10_000_000)
    max_train_epochs: int | None = setting(
        None, "Number of epochs; if given, it replaces max_train_steps.", minimum=1, maximum=1_000_000
    )
    resume: str = setting(
        "",
        "Continue an earlier run with a new number of steps. auto: the longest one that differs from this in "
        "nothing else; or the name of its folder below runs, with /ckpt/step-... for one save of it.",
        advanced=True,
    )
    train_batch_size: int = setting(1, "Images per micro-batch.", minimum=1, maximum=1024)
    gradient_accumulation_steps: int = setting(
        1, "Micro-batches per optimizer step.", minimum=1, maximum=1024, advanced=True
    )
    gradient_checkpointing: bool = setting(
        False, "Save memory by computing the forward pass twice.", advanced=True
    )
    mixed_precision: str = setting(
        "auto",
        "Compute precision. auto: bf16 or fp16 on a GPU, fp32 on a CPU. The adapter stays in fp32.",
        choices=PRECISIONS,
    )
    engine: str = setting(
        "auto",
        "How steps are executed. captured: as CUDA graphs, much faster for small batches; fused: fewer, "
        "larger kernels; eager: one after the other; auto: the first of them that can be. The LoRA is the "
        "same but for rounding.",
        choices=ENGINES,
        advanced=True,
    )
    deterministic: bool = setting(
        False,
        "On a GPU, take only operations that give the same bits every time, so that a stopped and continued "
        "run ends in the same file. Slower; a CPU does so by itself.",
        advanced=True,
    )
    attention: str = setting(
        "auto",
        "How the denoiser's attention is computed. auto measures on a GPU and takes the fastest; sdpa: "
        "PyTorch's own; xformers: where it is installed; plain: the formula, slow, to compare with.",
        choices=ATTENTIONS,
        advanced=True,
    )
    base_storage: str = setting(
        "as_is",
        "How the frozen base is kept in memory. fp8 and int8 take half of fp16's, nf4 a quarter; all three "
        "lose precision, and the loss is measured and printed.",
        choices=STORAGES,
        advanced=True,
    )
    memory: str = setting(
        "auto",
        "auto: where the run would not fit into the free memory, switch on what saves some without changing "
        "the result (checkpointing, then swapping blocks), and say so; off: only say what it will take.",
        choices=MEMORY,
        advanced=True,
    )
    blocks_to_swap: int = setting(
        0,
        "Keep the frozen weights of so many blocks of the denoiser in the computer's memory and bring them "
        "to the GPU when they are used; these blocks are also checkpointed.",
        minimum=0,
        maximum=1000,
        advanced=True,
    )
    on_divergence: str = setting(
        "rollback",
        "What happens when the loss is no number any more or explodes. rollback: once, go back to the last "
        "good state and on with half the learning rate; stop: end the run there.",
        choices=DIVERGENCE,
        advanced=True,
    )
    cache_latents: bool = setting(
        True, "Encode each image once and keep the result on disk, keyed by its content.", advanced=True
    )
    seed: int = setting(42, "Seed of everything random in the run.", minimum=0, maximum=2**63 - 1)
