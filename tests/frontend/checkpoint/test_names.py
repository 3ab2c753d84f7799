"""Names in files → parameters: transformers' own renamings and conversions, regexes included."""

import pytest
import torch
from stored import bind, bound, config_of, model_files, write
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from dilu.errors import DiluError
from dilu.frontend.checkpoint.names import Merge, merge_of, natural, numbers


@pytest.fixture(scope="module")
def dense():
    config = config_of("llama")
    return config, {k: v.bfloat16() for k, v in model_files(config).items()}


@pytest.fixture(scope="module")
def experts():
    config = config_of("qwen3_moe", num_experts=12)
    return config, {k: v.bfloat16() for k, v in model_files(config).items()}


def renamed(tensors, change):
    return {change(k): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.removeprefix("model."),
        lambda n: f"language_model.{n}",
        lambda n: n if n.startswith("lm_head") else n.replace("model.", "model.language_model.", 1),
        lambda n: n.replace("model.", "model.text_model.", 1),
    ],
)
def test_prefixes_of_models_and_of_text_models_in_others(tmp_path, dense, change):
    config, tensors = dense
    want = bound(write(tmp_path, config, tensors))
    got = bound(write(tmp_path, config, renamed(tensors, change)))
    assert all((got[n] == want[n]).all() for n in want)


def converted(monkeypatch, *transforms):
    import copy

    from transformers import conversion_mapping

    made = lambda *_, **__: copy.deepcopy(list(transforms))
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", made)


def test_patterns_are_regular_expressions(tmp_path, experts, monkeypatch):
    r"""As `\.experts.*.w1.weight`, in which the star is a regex's and the expert's number at once;
    12 experts, so that their order is by number."""
    config, tensors = experts
    want = bound(write(tmp_path, config, tensors))
    letters = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def change(name):
        for ours, theirs in letters.items():
            name = name.replace(ours, theirs)
        return name.replace(".mlp.", ".moe.")

    write(tmp_path, config, renamed(tensors, change))
    converted(
        monkeypatch,
        WeightRenaming(r"\.moe\.", ".mlp."),
        WeightConverter(
            source_patterns=[r"\.experts.*.w1.weight", r"\.experts.*.w3.weight"],
            target_patterns=".experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=[r"\.experts.*.w2.weight"],
            target_patterns=".experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    )
    got = bound(tmp_path)
    assert all((got[n] == want[n]).all() for n in want)


def test_a_parameter_in_shards(tmp_path, dense, monkeypatch):
    config, tensors = dense
    name = "model.embed_tokens.weight"
    parts = dict(enumerate(tensors[name].chunk(20)))  # shard_11 is behind shard_2
    shards = {f"model.embed.shard_{i}": part.clone() for i, part in parts.items()}
    want = bound(write(tmp_path, config, tensors))
    write(tmp_path, config, {k: v for k, v in tensors.items() if k != name} | shards)
    sharded = WeightConverter(
        r"model\.embed\.shard_(\d+)", "model.embed_tokens.weight", operations=[Concatenate(dim=0)]
    )
    converted(monkeypatch, sharded)
    got = bound(tmp_path)
    assert (got[name] == want[name]).all()


def test_what_is_made_in_another_way_is_refused_with_how(tmp_path, dense, monkeypatch):
    config, tensors = dense
    heads = ["q_proj", "k_proj", "v_proj"]
    converted(monkeypatch, WeightConverter("qkv_proj", heads, operations=[Chunk(dim=0)]))
    stem = "model.layers.0.self_attn."
    fused = {f"{stem}qkv_proj.weight": torch.ones(3)}
    kept = {k: v for k, v in tensors.items() if not any(h in k for h in heads)}
    write(tmp_path, config, kept | fused)
    with pytest.raises(DiluError, match=r"not supported: qkv_proj by Chunk\(dim=0\)"):
        bound(tmp_path)


def test_a_parameter_that_is_stored_twice(tmp_path, dense):
    config, tensors = dense
    twice = {"norm.weight": tensors["model.norm.weight"].clone()}
    bound(write(tmp_path, config, tensors | twice))
    twice["norm.weight"] += 1
    with pytest.raises(DiluError, match=r"'model\.norm\.weight' is stored twice: .* and 'norm"):
        bound(write(tmp_path, config, tensors | twice))


def test_experts_that_are_stored_in_one_tensor_and_in_many(tmp_path, experts):
    config, tensors = experts
    more = {"model.layers.0.mlp.experts.down_proj": torch.ones(12, 144, 72)}
    with pytest.raises(DiluError, match=r"experts\.down_proj' is stored twice: "):
        bound(write(tmp_path, config, tensors | more))


@pytest.mark.parametrize(
    ("count", "message"),
    [(13, "no tensor for expert 12, part 0 of"), (11, "has 11 experts, and the checkpoint has 12")],
)
def test_other_numbers_of_experts(tmp_path, experts, count, message):
    config, tensors = experts
    with pytest.raises(DiluError, match=message):
        bound(write(tmp_path, config | {"num_experts": count}, tensors))


def test_an_expert_that_is_missing(tmp_path, experts):
    config, tensors = experts
    gone = "model.layers.0.mlp.experts.7.up_proj.weight"
    with pytest.raises(DiluError, match=r"no tensor for expert 7, part 1 of '.*gate_up_proj'"):
        bound(write(tmp_path, config, {k: v for k, v in tensors.items() if k != gone}))


def test_layers_that_share_their_weights(tmp_path, dense):
    """A parameter of several layers is stored once, under the name of one of them."""
    config, tensors = dense
    config = config | {"num_hidden_layers": 2}
    write(tmp_path, config, tensors)

    def share(model):
        model.model.layers[1] = model.model.layers[0]

    binder, _ = bind(tmp_path, share)
    name = "model.layers.1.mlp.up_proj.weight"
    assert binder.weight([name], scales=False, stacked=False) == binder.weight(
        [binder.canonical(name)], scales=False, stacked=False
    )
    with pytest.raises(DiluError, match=r"no tensor for 'model\.layers\.1\."):
        bound(tmp_path)


def test_merges():
    merge, _ = merge_of(
        WeightConverter(["a", "b"], "c", operations=[MergeModulelist(dim=0), Concatenate(dim=1)])
    )
    assert merge == Merge(True, 2)
    assert merge.grid((5, 8, 3)) == ((5, 2), (4, 3))
    merge, how = merge_of(WeightConverter("a", "c", operations=[Concatenate(dim=1)]))
    assert (merge, how) == (None, "a by Concatenate(dim=1)")


def test_the_order_of_names():
    names = ["a.10.w", "a.9.w", "a.b", "a.9.v", "shard_11", "shard_2", "a." + "9" * 5000]
    assert sorted(names, key=natural)[-4:] == ["a." + "9" * 5000, "a.b", "shard_2", "shard_11"]
    assert numbers(["x.3.w", "x.11.w"]) == [3, 11]
    assert numbers(["x.3.w", "y.11.w"]) is None
    assert numbers(["x.3.w", "x.w"]) is None
