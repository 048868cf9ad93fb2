"""A plugin for vLLM: bases with a memory, served by vLLM's scheduler with one block of fixed size for each request.

How a layer with constant state is registered in vLLM 0.32, and what this package makes of it:

1. vLLM loads the entry point `vllm.general_plugins` in every process: `register`, in `plugin.py`.
2. A config parser for "hf" finds the memory in a merged config, or in `hf_overrides`, and names our class.
3. `MODELS_CONFIG_MAP` runs our hook before anything is built: it refuses what cannot work, and bounds a chunk.
4. The model is vLLM's Transformers backend. Of `Base` it overrides `_create_attention_instances` and `load_weights`.
5. Each attention module gets a `MambaBase` as `.attn`. It states shapes and dtypes; the scheduler sees no more.
6. `MambaSpec` makes a page of them. A request holds one block, whatever it has read (`mamba_cache_mode="none"`).
7. The block size in tokens is `max_model_len`, so that a block never fills. Pages of layers are padded to one size.
8. `bind_kv_cache` hands each layer its pages, cut into tensors `[blocks, ...]`: `layout.py` names them.
9. An attention backend with `is_ssm` has a metadata builder. It gets query starts, lengths and the block table.
10. The builder says which rows of the batch are whose: `step.py` reads them, a chunk of a prompt or one token each.
11. A chunk goes through the attention function of `ahn` itself, on a cache whose tensors are views of the block.
12. Single tokens of all requests are read together (`decode.py`), as their rings lie in the blocks.
13. Where all tokens of a step are such, whole decoder layers are left to the kernels (`decoder.py`, `linear.py`).
14. There is no metadata in a profiling run; the layers then answer zeros.
15. A new request finds in its block what another one left, which is overwritten by zeros at its first token.
16. A preempted request loses its block and is read again from its first token: vLLM does that by itself.
"""

from ahn.serving.vllm.plugin import register

__all__ = ["register"]
