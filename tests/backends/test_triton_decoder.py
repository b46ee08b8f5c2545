"""A Llama as torch and transformers write it, from its export to the launches: a prompt, a prompt behind a cache, one token.

No GPU is needed: the driver pretends, and Triton's interpreter computes every launch from its source.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends.triton import bundle
from optkit.cli.app import main
from optkit.data import draw
from optkit.graph import walk
from optkit.passes.base import Context
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.store import save
from optkit.targets import target

HERE = Path(__file__).resolve().parent
_SPEC = importlib.util.spec_from_file_location("launches", HERE / "device" / "launches.py")
launches = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(launches)

pytestmark = pytest.mark.needs("triton", "torch", "transformers")

_WORDS, _LAYERS, _PAST = 112, 2, 8
# New tokens at a time, and whether there are tokens before.
STAGES = {"prefill": (12, False), "prefill-cache": (4, True), "decode": (1, True)}
ATTENTION = {
    "prefill": "CausalMaskedAttention",
    "prefill-cache": "CausalMaskedAttention",
    "decode": "MaskedAttention",
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def llama():
    """Random weights, norms that scale, 4 heads in 2 groups."""
    import torch

    from optkit.benchmarks.families import hub

    torch.manual_seed(0)
    fields = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hub.config(
        "LlamaConfig", vocab_size=_WORDS, num_hidden_layers=_LAYERS, max_position_embeddings=128, **fields
    )
    module = hub.model("LlamaForCausalLM", config)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "norm" in name:
                weight.add_(torch.rand_like(weight) / 2)
            else:
                weight.mul_(4)
    return module


def exported(stage):
    from optkit.benchmarks.families import hub
    from optkit.exporting.export import export
    from optkit.frontend import proved

    new, behind = STAGES[stage]
    past = _PAST if behind else 0
    inputs = {
        "input_ids": hub.tokens(_WORDS, new),
        "attention_mask": hub.mask(hub.BATCH, past + new),
        "use_cache": True,
    }
    rows = {0: "batch", 1: "sequence"} if new > 1 else {0: "batch"}
    free = {"input_ids": rows, "attention_mask": rows}
    if behind:
        inputs["past_key_values"] = hub.caches(_LAYERS, 2, 16, _PAST)
        whole = "past+sequence" if new > 1 else "past+1"
        free = {"input_ids": rows, "attention_mask": {0: "batch", 1: whole}, **hub.cached(_LAYERS)}
    return proved(export(llama(), inputs, free, name=stage)).model


@pytest.fixture(scope="module", params=STAGES)
def compiled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = exported(request.param)
    save(model, folder / "model.onnx")
    return request.param, model, folder, compile_for("h100", folder)


def compile_for(target, folder, recipe="triton-fp16", *more):
    out = folder / f"{target}-{recipe}"
    arguments = [
        "compile",
        str(folder / "model.onnx"),
        "--target",
        target,
        "--recipe",
        recipe,
        "--out",
        str(out),
    ]
    assert main([*arguments, "--set", "options.rest=cpu", *more]) == 0
    return out


def test_every_product_of_a_llama_runs_in_a_kernel(compiled):
    stage, _, _, out = compiled
    graph = ir.load(out / bundle.MODEL).graph
    called = [n.op_type for n in graph if n.domain == "optkit"]
    left = {n.op_type for n in walk(graph) if n.domain == ""}
    assert not left & {"MatMul", "Gemm", "Softmax", "LayerNormalization", "Pow", "Sigmoid"}
    assert called.count("MatMul") == 7 * _LAYERS + 1
    assert called.count(ATTENTION[stage]) == _LAYERS
    assert called.count("Rotary") == 2 * _LAYERS
    assert (called.count("RmsNorm"), called.count("AddRmsNorm")) == (1, 2 * _LAYERS)
    assert called.count("SwiGlu") == _LAYERS
    queries = [n.attributes.get_int("last", 0) for n in graph if n.op_type == "CausalMaskedAttention"]
    assert queries == [int(stage == "prefill-cache")] * len(queries)
    # Norms, products and gates give each other float16: nothing is cast between them.
    floats = [n for n in graph if n.op_type == "Cast" and n.outputs[0].dtype == ir.DataType.FLOAT]
    assert all(n.outputs[0].is_graph_output() for n in floats if n.inputs[0].dtype == ir.DataType.FLOAT16)


@pytest.mark.parametrize(("batch", "new", "past"), [(2, 7, 5), (1, 70, 66)])
def test_the_launches_of_a_llama_give_what_onnx_runtime_gives(compiled, driver, tmp_path, batch, new, past):
    stage, model, _, out = compiled
    new = min(new, STAGES[stage][0]) if stage == "decode" else new
    given = draw(model, np.random.default_rng(1), {"batch": batch, "sequence": new, "past": past})
    given["attention_mask"][-1, :2] = 0
    found, log = launches.interpret(out, given, driver, tmp_path)
    assert len(log) == len(bundle.read(out)["launches"])
    right = ReferenceSession(model).run(given)
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert found[name].shape == value.shape
        # A query that may see nothing but hidden tokens is padding: what it gives nobody reads.
        rows = slice(2, None) if name == "logits" and stage == "prefill" else slice(None)
        found_, value = (a[:, rows] if name == "logits" else a for a in (found[name], value))
        size = _rms(value)
        # Two layers in float16: some twenty roundings of 2**-11 in a row.
        assert np.abs(found_ - value).max() / size < 0.03, name


@pytest.mark.parametrize("target", ["l4", "rtx4090"])
def test_a_llama_is_compiled_for_cards_too(compiled, target):
    _, _, folder, out = compiled
    found_at = compile_for(target, folder)
    found = bundle.read(found_at)
    assert found["arch"] == "sm_89"
    assert [row["op"] for row in found["launches"]] == [row["op"] for row in bundle.read(out)["launches"]]
    manifest = json.loads((found_at / "manifest.json").read_text())
    assert not manifest["evidence"]["ran_on_device"]
    assert not manifest["evidence"]["timed_on_device"]


@pytest.mark.parametrize("compiled", ["prefill-cache"], indirect=True)
@pytest.mark.parametrize(("recipe", "linear"), [("triton-int8", "LinearInt8"), ("triton-fp8", "LinearFp8")])
def test_a_llama_in_eight_bits_has_norms_and_gates_that_quantize(compiled, driver, tmp_path, recipe, linear):
    _, model, folder, _ = compiled
    (tmp_path / "calib").mkdir()
    sizes = {"batch": 2, "sequence": 9, "past": 6}
    for index in range(4):
        np.savez(tmp_path / "calib" / f"{index}.npz", **draw(model, np.random.default_rng([7, index]), sizes))
    out = compile_for("h100", folder, recipe, "--calib", str(tmp_path / "calib"))
    called = [row["op"] for row in bundle.read(out)["launches"]]
    assert called.count(linear) == 7 * _LAYERS + 1
    assert (called.count("RmsNormQuantize"), called.count("AddRmsNormQuantize")) == (1, 2 * _LAYERS)
    assert called.count("SwiGluQuantize") == _LAYERS
    # What attention gives goes onto a grid by itself.
    assert called.count("Quantize") == _LAYERS
    # Steps and zero points are operands: layers that differ in nothing else run the same program.
    programs = {(row["op"], *row["kernels"]) for row in bundle.read(out)["launches"]}
    ops = [op for op, *_ in programs]
    assert (ops.count("SwiGluQuantize"), ops.count("Quantize"), ops.count("RmsNormQuantize")) == (1, 1, 1)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["achieved"]["formats"][recipe.removeprefix("triton-")] >= 0.9
    given = draw(model, np.random.default_rng(1), sizes)
    found, _ = launches.interpret(out, given, driver, tmp_path)
    # Where sums in another order fall to the other side of a border between two steps, a step is what they differ by: that
    # is less than what steps take from the float32 graph.
    grids, right = ReferenceSession(out / bundle.MODEL).run(given), ReferenceSession(model).run(given)
    for name, value in right.items():
        lost = _rms(grids[name] - value)
        assert _rms(found[name] - grids[name]) < 0.7 * lost, name
        assert lost < (0.1 if linear == "LinearInt8" else 0.2) * _rms(value), name


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Cohere", {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "num_hidden_layers": _LAYERS, "max_position_embeddings": 128, "pad_token_id": 0}),
        ("GPTJ", {"n_embd": 64, "n_head": 4, "rotary_dim": 16, "n_layer": _LAYERS, "n_positions": 128}),
    ],
)  # fmt: skip
def test_decoders_that_turn_neighbours_do_so_in_a_kernel(kind, fields):
    from optkit.benchmarks.families import hub
    from optkit.exporting.export import export
    from optkit.frontend import proved

    module = hub.model(f"{kind}ForCausalLM", hub.config(f"{kind}Config", vocab_size=_WORDS, **fields))
    inputs = {
        "input_ids": hub.tokens(_WORDS, 12),
        "attention_mask": hub.mask(hub.BATCH, 12),
        "use_cache": False,
    }
    rows = {0: "batch", 1: "sequence"}
    free = {"input_ids": rows, "attention_mask": rows}
    model = proved(export(module, inputs, free, name=kind)).model
    given = draw(model, np.random.default_rng(1), {"batch": 2, "sequence": 9})
    right = ReferenceSession(model).run(given)["logits"]
    run_passes(model, Recipe.load("triton-fp16").passes, Context(target=target("h100")))
    called = [n.op_type for n in walk(model) if n.domain == "optkit"]
    assert called.count("RotaryPairs") == 2 * _LAYERS
    assert not {n.op_type for n in walk(model) if n.domain == ""} & {
        "Neg",
        "Slice",
        "MatMul",
        "LayerNormalization",
    }
    found = ReferenceSession(model).run(given)["logits"]
    assert _rms(found[:, 2:] - right[:, 2:]) < 0.02 * _rms(right[:, 2:])


def _rms(x):
    return float(np.sqrt(np.mean(x.astype(np.float64) ** 2)))
