import pytest
import torch
from torch import nn

from stvit_video import create_model, list_models, multiply_adds
from stvit_video.models.embed import PatchEmbed, sincos_table
from stvit_video.models.layers import Block
from stvit_video.models.semantic import SemanticTokens, make_pool
from stvit_video.models.tokens import Tokens

TINY = {"embed_dim": 24, "depth": 5, "num_heads": 3, "patch_size": (2, 8, 8)}
CLIP = {"num_classes": 5, "num_frames": 4, "image_size": 32}


def tiny(name="stvit_tiny_patch16_224", **sizes):
    sizes = {"base_depth": 1, "semantic_tokens": (2, 2, 2)} | TINY | sizes
    return create_model(name, **CLIP, **sizes)


@pytest.mark.parametrize(
    ("name", "frames", "published"),
    [
        ("vit_small_patch16_224", 16, 56.9),
        ("vit_base_patch16_224", 16, 180.3),
        ("stvit_small_patch16_224", 16, 22.7),
        ("stvit_base_patch16_224", 16, 72.9),
        ("stvit_large_patch16_224", 16, 234.0),
        ("vit_small_patch16_224", 1, 4.57),
        ("stvit_small_patch16_224", 1, 1.91),
    ],
)
def test_multiply_adds(name, frames, published):
    with torch.device("meta"):
        model = create_model(name, num_classes=400, num_frames=frames)
    cost = multiply_adds(model, num_frames=frames, image_size=224) / 1e9
    assert cost == pytest.approx(published, rel=0.01)


def test_multiply_adds_of_a_real_pass_are_the_same():
    model, clip = tiny().eval(), torch.randn(1, 3, 4, 32, 32)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(clip)
    assert counter.get_total_flops() // 2 == multiply_adds(model, num_frames=4, image_size=32)


def test_every_name_is_listed():
    names = {f"{kind}_{size}_patch16_224" for kind in ("vit", "stvit")
             for size in ("tiny", "small", "base", "large")}  # fmt: skip
    assert names | {"ptv_mvit_base_16x4", "ptv_slowfast_r50", "ptv_x3d_m"} <= set(list_models())


@pytest.mark.parametrize("sizes", [{}, {"pool": "avg"}, {"centres": False}, {"semantic_layers": 1},
    {"semantic_layers": 3}, {"layer_scale": 0.1}, {"semantic_tokens": None}, {"base_depth": 0},
    {"pos_embed": "sincos"}, {"checkpointing": True}])  # fmt: skip
def test_every_parameter_gets_a_gradient(sizes):
    model = tiny(**sizes)
    logits = model(torch.randn(2, 3, 4, 32, 32))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_block_of_x_is_block_of_x_with_itself_as_context():
    block, x = Block(24, 3).eval(), torch.randn(2, 7, 24)
    torch.testing.assert_close(block(x), block(x, context=x))


def test_attention_is_the_textbook_formula():
    attention, x, context = Block(24, 3).attn, torch.randn(2, 5, 24), torch.randn(2, 9, 24)
    weights = attention.weights(x, context)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    v = nn.functional.linear(context, attention.qkv.weight[48:], attention.qkv.bias[48:])
    v = v.view(2, 9, 3, 8).transpose(1, 2)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, 24))
    torch.testing.assert_close(attention(x, context), expected)


def test_patch_embedding_is_a_convolution():
    embed, clip = PatchEmbed((4, 16, 24), (2, 8, 8), 10), torch.randn(2, 3, 4, 16, 24)
    torch.testing.assert_close(embed(clip), embed.proj(clip).movedim(1, -1), atol=1e-5, rtol=1e-5)


def test_sincos_table_is_videomaes():
    table = sincos_table((2, 3, 4), 6).view(24, 6)
    for position, feature in ((0, 0), (5, 0), (5, 1), (7, 4), (23, 5)):
        angle = torch.tensor(position / 10000 ** (2 * (feature // 2) / 6))
        expected = angle.sin() if feature % 2 == 0 else angle.cos()
        torch.testing.assert_close(table[position, feature], expected)


def test_semantic_tokens_follow_the_paper_step_by_step():
    first, second = Block(24, 3).eval(), Block(24, 3).eval()
    semantic = SemanticTokens((4, 6, 6), 24, semantic_tokens=(2, 3, 3))
    nn.init.normal_(semantic.centres)
    grid = torch.randn(2, 4, 6, 6, 24)
    x = grid.view(2, 144, 24)
    pooled = grid.view(2, 2, 2, 3, 2, 3, 2, 24).amax((2, 4, 6)).view(2, 18, 24)

    def layer(block, q, kv):
        q = q + block.attn(block.norm1(q), block.norm1(kv))
        return q + block.mlp(block.norm2(q))

    s1 = layer(first, pooled, x)
    s2 = layer(second, s1 + semantic.centres.view(1, 18, 24), torch.cat([s1, x], 1))
    torch.testing.assert_close(semantic(Tokens.of(grid), [first, second]).x, s2)


def test_semantic_maps():
    model, clip = tiny().eval(), torch.randn(2, 3, 4, 32, 32)
    maps = model.semantic_maps(clip)
    assert maps.shape == (2, 8, 2, 4, 4)
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(2, 8))
    assert (maps >= 0).all()


def test_semantic_maps_are_the_attention_that_makes_the_tokens():
    """With values that mark one patch, the last layer's output says how much that patch gave."""
    model, clip = tiny(semantic_layers=2).eval(), torch.randn(1, 3, 4, 32, 32)
    tokens = dict(model._layers(clip))[1]
    start = model.semantic._start(tokens)
    query, _, *context = model.semantic._last_question(tokens, start, model.blocks[1:3])
    weights = model.blocks[2].attention_map(query, torch.cat(context, 1)).mean(1)
    assert weights.shape == (1, 8, 8 + 32)
    share = weights[..., 8:] / weights[..., 8:].sum(-1, keepdim=True)
    torch.testing.assert_close(model.semantic_maps(clip), share.view(1, 8, 2, 4, 4))


def test_features():
    model, clip = tiny().eval(), torch.randn(2, 3, 4, 32, 32)
    features = model.forward_features(clip)
    assert features.shape == (2, 2, 2, 2, 24)
    pooled = model.fc_norm(features.mean((1, 2, 3)))
    torch.testing.assert_close(model(clip), model.head(pooled))
    assert tiny(semantic_tokens=None).forward_features(clip).shape == (2, 2, 4, 4, 24)


def test_an_image_is_a_clip_of_one_frame():
    model = create_model(
        "stvit_tiny_patch16_224", num_classes=3, num_frames=1, image_size=64, depth=7
    ).eval()
    assert model.patch_embed.patch_size == (1, 16, 16)
    assert model.semantic.tokens == (1, 4, 4)
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(image), model(image.unsqueeze(2)))


def test_dense_and_semantic_models_have_the_same_layers():
    dense, semantic = tiny(semantic_tokens=None).state_dict(), tiny().state_dict()
    assert semantic.keys() - dense.keys() == {"semantic.centres"}
    assert dense.keys() <= semantic.keys()


def test_checkpointing_changes_nothing():
    plain, clip = tiny(drop_path=0.2), torch.randn(2, 3, 4, 32, 32)
    saving = tiny(drop_path=0.2, checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    gradients = []
    for model in (plain, saving):
        torch.manual_seed(1)
        model(clip).sum().backward()
        gradients.append(model.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_what_the_backward_pass_makes_anew_is_what_it_was():
    model, clip = tiny(), torch.randn(2, 3, 4, 32, 32)
    gradients = []
    for training in (True, False):  # only in training the semantic layers' keys and values are made anew
        model.train(training).zero_grad()
        model(clip).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("size", [(2, 2, 2), (3, 4, 5), (4, 6, 6)])
def test_max_pooling_is_torchs_own(size):
    x = torch.randn(2, 4, 6, 6, 5, requires_grad=True)
    ours = make_pool("max")(x, size)
    plain = nn.functional.adaptive_max_pool3d(x.movedim(-1, 1), size).movedim(1, -1)
    assert torch.equal(ours, plain)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, plain)]
    torch.testing.assert_close(*gradients)


def test_a_training_step_keeps_less_than_half_of_what_a_dense_one_keeps():
    def kept(tokens):  # the same share of the patches as 128 of 1568
        name = "stvit_tiny_patch16_224"
        model = create_model(name, num_classes=5, num_frames=8, image_size=112, semantic_tokens=tokens)
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: held.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            model(torch.randn(2, 3, 8, 112, 112))
        return sum(t.untyped_storage().nbytes() for t in held.values() if t.dim() > 2)  # no parameters

    share = kept((4, 2, 2)) / kept(None)
    assert share < 0.45


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"patch_size": (3, 8, 8)}, ("4 frames", "tubelets of 3", "patch_size")),
        ({"patch_size": (2, 7, 8)}, ("32 rows", "tubelets of 7", "patch_size")),
        ({"semantic_tokens": (3, 2, 2)}, ("(3, 2, 2)", "(2, 4, 4)", "semantic_tokens")),
        ({"num_heads": 5}, ("24", "5", "num_heads")),
        ({"base_depth": 4}, ("base_depth=4", "semantic_layers=2", "depth=5")),
        ({"pool": "median"}, ("median", "avg")),
        ({"pos_embed": "rope"}, ("rope", "sincos")),
        ({"embed_dim": 0}, ("embed_dim=0", "between 1 and inf")),
        ({"depth": 2.0}, ("depth=2.0", "whole numbers")),
        ({"base_depth": True}, ("base_depth=True", "whole numbers")),
        ({"semantic_tokens": (2, 0, 2)}, ("semantic_tokens=(2, 0, 2)", "between 1 and inf")),
        ({"drop_path": 1}, ("drop_path=1", "between 0 and 0.999")),
        ({"tome_r": 3}, ("tome_r=3", "reducer=tome")),
    ],
)
def test_sizes_that_do_not_fit(sizes, parts):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (parts are checked)
        tiny(**sizes)
    for part in parts:
        assert part in str(error.value)


def test_input_of_another_shape():
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 32, 32\).*\(B, 3, 4, 32, 32\).*num_frames=4"):
        tiny()(torch.randn(2, 3, 8, 32, 32))


def test_unknown_names_suggest_the_right_one():
    with pytest.raises(TypeError, match="embed_dims.*did you mean 'embed_dim'"):
        tiny(embed_dims=3)
    with pytest.raises(TypeError, match="vit_tiny_patch16_224 takes no size 'base_depth'"):
        create_model("vit_tiny_patch16_224", num_classes=3, base_depth=3)
    with pytest.raises(ValueError, match="did you mean 'stvit_tiny_patch16_224'"):
        create_model("stvit_tiny_patch16", num_classes=3)


def test_a_block_without_a_residual_path_does_not_drop_its_attention():
    """As in the authors' STViT-R; its MLP is dropped as in any block."""
    block = Block(16, 2, drop_path=0.999, residual=False).train()
    x, context = torch.randn(64, 4, 16), torch.randn(64, 9, 16)
    taken = block.attn(block.norm1(x), block.norm1(context))
    dropped = (block(x, context) == taken).flatten(1).all(1)
    assert dropped.float().mean() > 0.9
    assert (taken != 0).all()


@pytest.mark.parametrize("name", ["stvit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_dropout_is_of_the_features_before_the_head(name):
    sizes = {"depths": [1, 1, 1, 1]} if "swin" in name else {"depth": 4, "base_depth": 1}
    model = create_model(name, num_classes=3, num_frames=1, image_size=64, dropout=0.75, **sizes)
    image, seen = torch.randn(2, 3, 64, 64), []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.eval()(image)
    model.train()(image)
    whole, dropped = seen
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 4 * whole[kept])
    assert 0.1 < kept.float().mean() < 0.4
