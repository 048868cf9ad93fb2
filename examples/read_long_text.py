"""Read a text of any length in constant memory, and see what each mode keeps and how well it predicts.

A tiny random model stands in for a real one, so that this runs anywhere in seconds. For a real one replace the two
lines that make it by `model = ahn.from_pretrained("smollm2-135m", config=config)`, and `ids` by its tokens of a text.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ahn
from ahn.generation import full_cache_bytes, read

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
config = ahn.AHNConfig(window=64, sinks=4, sink_positions="bounded")

model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=1024, **sizes)).eval()
ahn.attach(model, config)
ids = torch.randint(256, (2_000,))

for mode in ("full", "window", "ahn"):
    with ahn.mode(model, mode):
        reading = read(model, ids, chunk=250)
    held = reading.cache.nbytes if isinstance(reading.cache, ahn.HippocampalCache) else full_cache_bytes(model, 2_000)
    print(f"{mode:6}  {reading.tokens:,} tokens  {held / 1e3:7.1f} kB  {reading.nll.mean():.3f} nats a token")
