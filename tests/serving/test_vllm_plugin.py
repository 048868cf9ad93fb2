"""What vLLM calls of the plugin, with a stand-in for vLLM: what it registers, refuses, and tells the scheduler."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import ahn
from ahn.attachment import attachment_of
from ahn.config import AHNConfig
from ahn.errors import CheckpointError, ConfigError
from ahn.serving.vllm.checks import check
from ahn.serving.vllm.layout import block_bytes, block_tensors, empty_cache
from ahn.serving.vllm.memory import own_heads, read_memory, survey_base
from ahn.serving.vllm.parsing import with_memory
from ahn.serving.vllm.plugin import register, version_problem
from ahn.serving.vllm.runtime import Rows, Runtime, ServedLayer
from tests import tiny
from tests.serving.vllm_stub import Stub

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "qwen2_GatedDeltaNet"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    stub = Stub("0.32.0")
    stub.install(monkeypatch)
    yield stub
    sys.modules.pop("ahn.serving.vllm.layer", None)


def settings_of(folder: Path = GOLDEN, overrides: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Settings as vLLM has them when it asks a model's hook."""
    values = json.loads((folder / "config.json").read_text())
    config = with_memory(values, {f"ahn_{name}": value for name, value in (overrides or {}).items()}, str(folder))
    scheduler = SimpleNamespace(long_prefill_token_threshold=0, long_prefill_token_threshold_adaptive=True)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=config, model=str(folder), revision=None, max_model_len=512, enforce_eager=False
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=changes.get("prefix_caching", False)),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=changes.get("tensor", 1), pipeline_parallel_size=changes.get("pipeline", 1)
        ),
        scheduler_config=SimpleNamespace(**{**vars(scheduler), **changes.get("scheduler", {})}),
        speculative_config=changes.get("speculative"),
    )


class TestRegistering:
    def test_all_that_vllm_needs(self, stub: Stub) -> None:
        register()
        names = ["AHNForCausalLM", "AHNMoEForCausalLM"]
        assert stub.models == {name: f"ahn.serving.vllm.model:{name}" for name in names}
        assert list(stub.parsers) == ["hf"]
        assert list(stub.checks) == names

    @pytest.mark.parametrize("version", ["0.32.0", "0.32.4+cpu"])
    def test_versions_that_were_tested(self, version: str) -> None:
        assert version_problem(version) is None

    @pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "dev"])
    def test_other_versions(self, version: str) -> None:
        assert version_problem(version) == (
            f"ahn serves a memory through vLLM 0.32, and this is vLLM {version}, whose inner interfaces may differ; "
            'install "vllm==0.32.*", or serve the folder by `ahn serve`'
        )

    def test_another_version_refuses_a_memory_and_nothing_else(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        stub = Stub("0.40.0")
        stub.install(monkeypatch)
        register()
        assert not stub.models
        parser = stub.parsers["hf"]()
        with pytest.raises(ConfigError, match=r"and this is vLLM 0\.40\.0"):
            parser.parse(GOLDEN, trust_remote_code=False)
        tiny.tiny().save_pretrained(tmp_path)
        assert parser.parse(tmp_path, trust_remote_code=False)[1].model_type == "llama"

    def test_a_version_without_parsers_is_named(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        stub = Stub("0.1.0")
        stub.install(monkeypatch)
        del sys.modules["vllm.transformers_utils.config"].register_config_parser  # type: ignore[attr-defined]
        register()
        assert [record.getMessage() for record in caplog.records] == [version_problem("0.1.0")]


class TestConfigs:
    def test_a_merged_folder(self, stub: Stub) -> None:
        register()
        values, config = stub.parsers["hf"]().parse(str(GOLDEN), trust_remote_code=False)
        assert values["_ahn_implementation"] == "GatedDeltaNet"
        assert (config.model_type, config.architectures) == ("qwen2", ["AHNForCausalLM"])
        assert config.sliding_window is None
        assert config.ahn_settings == {}

    def test_a_base_and_what_the_overrides_name(self, stub: Stub, tmp_path: Path) -> None:
        tiny.tiny().save_pretrained(tmp_path)
        register()
        overrides = {"ahn_adapter": "smollm2-135m/gated_delta_net", "ahn_window": 300, "max_position_embeddings": 9}
        _, config = stub.parsers["hf"]().parse(tmp_path, trust_remote_code=False, hf_overrides=overrides)
        assert config.architectures == ["AHNForCausalLM"]
        assert config.ahn_settings == {"adapter": "smollm2-135m/gated_delta_net", "window": 300}

    def test_a_base_with_experts(self) -> None:
        config = with_memory(tiny.tiny("qwen3_moe").config.to_dict(), {"ahn_adapter": "x"}, "x")
        assert config is not None
        assert config.architectures == ["AHNMoEForCausalLM"]

    def test_a_model_without_a_memory(self, tmp_path: Path) -> None:
        assert with_memory({"model_type": "llama"}, None, "x") is None
        assert with_memory({"model_type": "llama"}, lambda config: config, "x") is None

    @pytest.mark.parametrize(
        ("values", "overrides", "message"),
        [
            ({"model_type": "llama"}, {"ahn_window": 256}, "hf_overrides names ahn_window, but x has no memory"),
            ({"model_type": "none"}, {"ahn_adapter": "y"}, "transformers has no model 'none'"),
        ],
    )
    def test_what_is_refused(self, values: dict[str, Any], overrides: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            with_memory(values, overrides, "x")


class TestChecks:
    def test_a_block_holds_a_request(self) -> None:
        settings = settings_of()
        check(settings)
        assert settings.cache_config.mamba_block_size == 512
        assert settings.cache_config.mamba_cache_mode == "none"
        assert settings.model_config.enforce_eager
        assert settings.scheduler_config.long_prefill_token_threshold == 0

    @pytest.mark.parametrize(("asked", "bound"), [(0, 45), (30, 30), (200, 45)])
    def test_no_chunk_is_longer_than_anchors_allow(self, asked: int, bound: int) -> None:
        overrides = {"window": 64, "anchors": 4, "anchor_score": "key_diff"}
        settings = settings_of(overrides=overrides, scheduler={"long_prefill_token_threshold": asked})
        check(settings)
        assert settings.scheduler_config.long_prefill_token_threshold == bound
        assert not settings.scheduler_config.long_prefill_token_threshold_adaptive

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prefix_caching": True}, "prefix caching needs states at the ends of blocks"),
            ({"speculative": object()}, "speculative decoding takes tokens back"),
            (
                {"overrides": {"windows": 3}},
                "hf_overrides names ahn_windows; known are ahn_adapter, ahn_anchor_",
            ),
            ({"overrides": {"window": 0}}, "window must be a whole number of at least 1"),
            ({"overrides": {"window": 64, "anchors": 4}, "tensor": 2}, "anchors are chosen by scores of layers and"),
            ({"overrides": {"window": 64, "anchors": 4}, "pipeline": 2}, "anchors are chosen by scores of layers and"),
            ({"overrides": {"window": 64, "anchors": 4, "anchor_score": "learned"}}, "has no weights on this model"),
        ],
    )
    def test_what_is_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            check(settings_of(**changes))

    def test_overrides_that_no_plugin_sees(self) -> None:
        settings = settings_of()
        settings.model_config.hf_config.ahn = {"window": 64}  # as vLLM sets it afterwards
        with pytest.raises(ConfigError, match='hf_overrides names "ahn" as a mapping'):
            check(settings)

    def test_a_norm_over_all_heads_needs_them_in_one_process(self) -> None:
        folder = GOLDEN.with_name("qwen2_Mamba2")
        check(settings_of(folder, pipeline=2))
        with pytest.raises(ConfigError, match="the memory mamba2 takes a norm over all heads"):
            check(settings_of(folder, tensor=2))

    def test_stages_of_a_pipeline_take_one_kind_of_memory(self, tmp_path: Path) -> None:
        model = tiny.with_memory("llama", "gated_delta_net+linearized_attention")
        ahn.save(model, tmp_path / "adapter")
        ahn.detach(model)
        model.save_pretrained(tmp_path / "base")
        overrides = {"adapter": str(tmp_path / "adapter")}
        check(settings_of(tmp_path / "base", overrides, tensor=2))
        with pytest.raises(ConfigError, match="keep states of several sizes, which give wrong tokens in a pipeline"):
            check(settings_of(tmp_path / "base", overrides, pipeline=2))

    def test_a_memory_without_its_base(self, tmp_path: Path) -> None:
        shutil.copyfile(GOLDEN / "config.json", tmp_path / "config.json")
        with pytest.raises(CheckpointError):
            read_memory({}, str(tmp_path))
        shutil.copyfile(GOLDEN / "ahn_only.safetensors", tmp_path / "model.safetensors")
        with pytest.raises(ConfigError, match="holds a memory without a base"):
            read_memory({}, str(tmp_path))

    def test_layers_that_keep_a_growing_cache(self) -> None:
        base = tiny.tiny().config
        with pytest.raises(ConfigError, match=r"layers \[0, 2\] keep the base model's own attention"):
            survey_base(base, AHNConfig(window=16, sinks=2, layers=(1,)))

    def test_rotations_that_change_with_the_length(self) -> None:
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        base = tiny.tiny(rope_parameters=rope).config
        with pytest.raises(ConfigError, match="rotary positions of this model change with the length"):
            survey_base(base, AHNConfig(window=16, sinks=2))

    def test_a_wrapper_around_a_text_model(self) -> None:
        with pytest.raises(ConfigError, match="llava wraps a text model"):
            survey_base(AutoConfig.for_model("llava"), AHNConfig(window=16, sinks=2))

    @pytest.mark.parametrize("family", ["granite", "qwen3_moe"])
    def test_the_base_is_surveyed_without_its_weights(self, family: str) -> None:
        model = tiny.with_memory(family)
        found = survey_base(model.config, attachment_of(model).config)
        assert [layer.shape for layer in found.layers] == [layer.shape for layer in attachment_of(model).layers]
        assert all(layer.module.q_proj.weight.is_meta for layer in found.layers)


class TestLayers:
    def test_shares_of_heads(self) -> None:
        tensor = torch.arange(12).view(6, 2)
        assert torch.equal(torch.cat([own_heads(tensor, 2, rank) for rank in range(3)]), tensor)
        assert own_heads(tensor, 6, 1) is tensor

    def test_the_builder_finds_whose_tokens_are_whose(self, stub: Stub) -> None:
        layer = importlib.import_module("ahn.serving.vllm.layer")
        common = SimpleNamespace(
            query_start_loc_cpu=torch.tensor([0, 1, 8, 8]),
            seq_lens_cpu_upper_bound=torch.tensor([30, 7, 0]),
            block_table_tensor=torch.tensor([[4], [2], [0]]),
        )
        metadata = layer.RequestMetadataBuilder().build(0, common)
        assert metadata.rows == [Rows(4, 29, 0, 1), Rows(2, 0, 1, 8)]
        assert layer.StateBackend.get_builder_cls() is layer.RequestMetadataBuilder
        assert layer.StateBackend.is_ssm()

    def test_a_layer_tells_its_size_and_takes_its_pages(self, stub: Stub) -> None:
        layer = importlib.import_module("ahn.serving.vllm.layer")
        model = tiny.with_memory("llama:wide")
        attachment = attachment_of(model)
        tensors = block_tensors(empty_cache(attachment, attachment.settings), 0)
        runtime = Runtime(attachment, attachment.settings, {0: ServedLayer(attachment.layers[0], tensors)})
        page = block_bytes(tensors)
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context={}),
            cache_config=SimpleNamespace(mamba_block_size=512),
        )
        attention = layer.MemoryAttention(
            runtime.layers[0], layer.StepHolder(runtime, "layers.0.attn"), page, "layers.0.attn", config
        )
        assert config.compilation_config.static_forward_context == {"layers.0.attn": attention}
        spec = attention.get_kv_cache_spec(config)
        assert (spec.block_size, spec.page_size_padded, spec.mamba_type) == (512, page, "custom")
        cache = ahn.HippocampalCache(model)
        model(tiny.text(tokens=75), cache=cache)
        held = {name: tensor.shape[1:] for name, tensor in cache.layers[0].tensors().items()}
        attention.bind_kv_cache(torch.zeros(5, 1, 1, page, dtype=torch.int8))
        assert {name: pages.shape for name, pages in runtime.layers[0].pages.items()} == {
            name: (5, *shape) for name, shape in held.items()
        }

        query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
        assert not attention.forward(None, (query, key, key), {}).any()  # vLLM only profiles: there is no metadata
        metadata = {"layers.0.attn": layer.RequestMetadata([Rows(2, 0, 0, 3)])}
        stub.context = SimpleNamespace(attn_metadata=metadata)
        step = attention.holder.find()
        assert step is attention.holder.find()
        stub.context = SimpleNamespace(attn_metadata=metadata)
        assert step is not attention.holder.find()
