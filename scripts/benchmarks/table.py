"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Mapping

from scripts.benchmarks import (
    chunked_head,
    geometry_offline,
    geometry_step,
    objectives,
    packed_sweep,
    pair_chain,
    step,
    sweep_folders,
    token_heatmap,
    trl_throughput,
)
from scripts.benchmarks.measuring import Benchmark

BENCHMARKS: Mapping[str, Benchmark] = {
    "step": Benchmark(
        summary="DPO training step with AdamW, GPT-2 small, 4 pairs of 128 tokens, float32, against plain PyTorch",
        extra="peers",
        modules=("torch", "transformers"),
        packages=("jax", "jaxlib", "flax", "optax", "torch", "transformers"),
        prepare=step.prepare,
        warm_up=2,
        runs=5,
        tolerance=1e-4,
    ),
    "trl_throughput": Benchmark(
        summary="DPO training, exact geometry on, GPT-2 small, 4 pairs of 64 + 64 tokens a step, float32, against TRL",
        extra="peers",
        modules=("torch", "transformers", "trl"),
        packages=("jax", "jaxlib", "flax", "optax", "torch", "transformers", "trl"),
        prepare=trl_throughput.prepare,
        warm_up=2,
        runs=9,
        tolerance=1e-4,
        pairs=trl_throughput.PAIRS,
    ),
    "geometry_step": Benchmark(
        summary="DPO gradient with every pair's exact geometry, GPT-2 small, 4 pairs of 128 tokens, float32, against without",
        extra="train",
        modules=("flax",),
        packages=("jax", "jaxlib", "flax"),
        prepare=geometry_step.prepare,
        warm_up=2,
        runs=9,
        tolerance=1e-5,
    ),
    "geometry_offline": Benchmark(
        summary="exact geometry of 64 pairs, GPT-2 small, 15 to 45 tokens a row, float32, against 2 PyTorch backwards a pair",
        extra="peers",
        modules=("torch", "transformers"),
        packages=("jax", "jaxlib", "flax", "torch", "transformers"),
        prepare=geometry_offline.prepare,
        warm_up=1,
        runs=5,
        tolerance=1e-4,
    ),
    "token_heatmap": Benchmark(
        summary="cosines of 16 by 16 token gradients of one pair, GPT-2 small, float32, against a PyTorch backward a token",
        extra="peers",
        modules=("torch", "transformers"),
        packages=("jax", "jaxlib", "flax", "torch", "transformers"),
        prepare=token_heatmap.prepare,
        warm_up=1,
        runs=5,
        tolerance=1e-4,
    ),
    "token_heatmap_long": Benchmark(
        summary="cosines of 64 by 64 token gradients of one pair, GPT-2 small, float32; PyTorch would need 59 GiB",
        extra="train",
        modules=("flax",),
        packages=("jax", "jaxlib", "flax"),
        prepare=token_heatmap.prepare_long,
        warm_up=1,
        runs=5,
        tolerance=1e-4,
    ),
    "chunked_head": Benchmark(
        summary="log-probabilities and gradients of a head of 128,256 tokens in slices, 4 rows of 1,024, against it whole",
        extra="train",
        modules=("flax",),
        packages=("jax", "jaxlib", "flax"),
        prepare=chunked_head.prepare,
        warm_up=1,
        runs=5,
        tolerance=1e-5,
    ),
    "objectives": Benchmark(
        summary="all objectives and coefficients, 4,096 pairs, float32, against GPT-2 small's forward on 1 pair of 128 tokens",
        extra="train",
        modules=("flax",),
        packages=("jax", "jaxlib", "flax"),
        prepare=objectives.prepare,
        warm_up=2,
        runs=21,
        # each contender against its own uncompiled work
        tolerance=1e-4,
    ),
    "pair_chain": Benchmark(
        summary="optimizer's step of a pair chain, 124 million parameters, float32, against AdamW alone",
        extra="train",
        modules=("flax",),
        packages=("jax", "jaxlib", "optax"),
        prepare=pair_chain.prepare,
        warm_up=2,
        runs=21,
        # each contender against its own step in NumPy
        tolerance=1e-3,
    ),
    **{
        f"packed_sweep{suffix}": Benchmark(
            summary=f"30 trials (10 objectives, 3 seeds) in one program, start-up and compilation included, {said}",
            extra="train",
            modules=("flax",),
            packages=("jax", "jaxlib", "flax", "optax"),
            prepare=prepare,
            warm_up=0,
            # half an hour; every trial's loss is compared between the sides
            runs=1,
            tolerance=packed_sweep.TOLERANCE,
        )
        for suffix, said, prepare in (
            ("", "against a process each", packed_sweep.prepare),
            ("_cached", "against a process each, with a compilation cache that was empty", packed_sweep.prepare_cached),
        )
    },
    "sweep_summary": Benchmark(
        summary="summary of a sweep from 10,000 finished run folders",
        extra="train",
        modules=("flax",),
        packages=("jax",),
        prepare=sweep_folders.prepare_summary,
        warm_up=1,
        runs=5,
        tolerance=0.0,
    ),
    "sweep_resume": Benchmark(
        summary="the command of a finished sweep of 1,000 trials, once more: a process from its start to its end",
        extra="train",
        modules=("flax",),
        packages=("jax",),
        prepare=sweep_folders.prepare_resume,
        warm_up=1,
        runs=5,
        tolerance=0.0,
    ),
    **{
        f"geometry_step_{name}_{length}": Benchmark(
            summary=f"the same in bfloat16, {size}, 4 pairs of {length} tokens; for an accelerator",
            extra="train",
            modules=("flax",),
            packages=("jax", "jaxlib", "flax"),
            prepare=geometry_step.preparation(model, length),
            warm_up=2,
            runs=9,
            # of a loss of log-probabilities that are sums over hundreds of tokens, each from activations of 8 bits
            tolerance=1e-2,
        )
        for name, size, model in (
            ("gpt2", "GPT-2 small", geometry_step.gpt2),
            ("qwen", "the size of Qwen2.5-0.5B", geometry_step.qwen),
        )
        for length in (128, 512, 1024)
    },
}
"""Name to benchmark; the first contender is this package."""
