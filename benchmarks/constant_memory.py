"""Does memory stay constant? Reads 100,000 tokens with a memory and prints cache bytes and peak resident memory.

    python benchmarks/constant_memory.py           # SmolLM2, window 1024; some minutes on a laptop
    python benchmarks/constant_memory.py --tiny    # a random model of three layers; some seconds

Exits with 1 if the cache grew after its window was full, or the peak at the end passes that at a fifth of it by 5 %.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch

import ahn


@torch.inference_mode()
def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tokens", type=int, default=100_000)
    arguments.add_argument("--window", type=int, default=1024)
    arguments.add_argument("--sinks", type=int, default=32)
    arguments.add_argument("--chunk", type=int, default=512)
    arguments.add_argument("--memory", default="gated_delta_net")
    arguments.add_argument("--tiny", action="store_true")
    options = arguments.parse_args()
    model, ids = tiny_model(options.tokens) if options.tiny else smollm2(options.tokens)
    config = ahn.AHNConfig(options.memory, options.window, options.sinks, sink_positions="bounded")
    ahn.attach(model, config)
    cache, marks, started = ahn.HippocampalCache(model), {}, time.perf_counter()
    print(f"{'tokens':>8}  {'cache bytes':>12}  {'peak resident MB':>16}  {'tokens/s':>8}")
    for part in ids.split(options.chunk, dim=1):
        model(part, cache=cache, logits_to_keep=1)
        seen = cache.seen_tokens
        if seen % (10 * options.chunk) < options.chunk or seen == ids.size(1):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            marks[seen] = (cache.nbytes, peak)
            rate = seen / (time.perf_counter() - started)
            print(f"{seen:>8}  {cache.nbytes:>12}  {peak:>16.1f}  {rate:>8.0f}", flush=True)
    sys.exit(verdict(marks, options))


def verdict(marks: dict[int, tuple[int, float]], options: argparse.Namespace) -> int:
    """Prints how much grew; 1 if anything that must not."""
    full = [size for seen, (size, _) in marks.items() if seen >= options.window + options.sinks]
    early = max(peak for seen, (_, peak) in marks.items() if seen <= max(options.tokens // 5, min(marks)))
    late = max(peak for _, peak in marks.values())
    constant = len(set(full)) == 1
    print(f"cache constant once the window is full: {'yes' if constant else 'NO'}")
    print(f"peak resident memory at the end / at a fifth: {late / early:.3f}")
    return 0 if constant and late / early <= 1.05 else 1


def smollm2(tokens: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """SmolLM2 and Python's language reference."""
    from pydoc_data.topics import topics

    from ahn.models import load_model, load_tokenizer

    ids = load_tokenizer("smollm2-135m")("\n\n".join(topics.values()), return_tensors="pt").input_ids
    return load_model("smollm2-135m"), ids[:, :tokens]


def tiny_model(tokens: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A random llama of three layers and random text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096)
    return LlamaForCausalLM(config).eval(), torch.randint(3, 128, (1, tokens))


if __name__ == "__main__":
    main()
