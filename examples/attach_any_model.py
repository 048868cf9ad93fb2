"""Give any decoder of transformers a memory, use it as ever, save the memory alone, and take it off again."""

import tempfile

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, Qwen3Config

import ahn

torch.manual_seed(0)
SIZES = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
prompt = torch.randint(2, 256, (1, 200))

for kind in (Qwen3Config, Gemma2Config, GptOssConfig):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind is GptOssConfig else {}
    model = AutoModelForCausalLM.from_config(kind(**SIZES, **experts)).eval()
    before = model(prompt).logits

    ahn.attach(model, ahn.AHNConfig(memory="gated_delta_net", window=48, sinks=4))
    new = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.size(1) :]
    with tempfile.TemporaryDirectory() as folder:
        ahn.save(model, folder)  # the memory's weights only
        ahn.load(model, folder)
    ahn.detach(model)

    assert torch.equal(model(prompt).logits, before)
    print(f"{model.config.model_type}: wrote {new.tolist()} with a memory, and is itself again without")
