"""Read once, then ask as often as you like: fork a live cache, save it, and go on from the file."""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ahn
from ahn.generation import read

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).eval()
ahn.attach(model, ahn.AHNConfig(window=64, sinks=4))

text = torch.randint(256, (500,))
cache = read(model, text, score=False).cache

# Each question goes on from its own copy, so that none sees the others.
questions = torch.randint(256, (3, 8))
forked = [read(model, question, cache=cache.fork()).logits for question in questions]

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "text.cache"
    cache.save(file)
    print(f"{cache.seen_tokens} tokens in {file.stat().st_size / 1e3:.1f} kB")
    again = [read(model, question, cache=ahn.HippocampalCache.load(file, model)).logits for question in questions]

assert all(torch.equal(one, other) for one, other in zip(forked, again))
print("from the file as from the fork, bit for bit:", [int(logits.argmax()) for logits in again])
