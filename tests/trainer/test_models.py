"""Models against plain definitions of their parts; augmentation against what it promises."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.trainer.tasks import augment, gru, image_models, transformer

RNGS = nnx.Rngs(0)


SHAPES = pytest.mark.parametrize("shape", [(4, 8, 6, 3), (4, 9, 7, 3)])


def _window(x):
    strides = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, strides, strides, "VALID")


@SHAPES
def test_max_pool_and_its_gradient_are_those_of_reduce_window(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    np.testing.assert_array_equal(image_models.max_pool(x), _window(x))
    g = jax.random.normal(jax.random.key(1), _window(x).shape)
    pull = lambda f: jax.vjp(f, x)[1](g)[0]
    np.testing.assert_array_equal(pull(image_models.max_pool), pull(_window))


@SHAPES
def test_max_pool_shares_the_gradient_among_ties(shape):
    x = np.array(jnp.round(jax.random.normal(jax.random.key(0), shape)))
    y = np.asarray(image_models.max_pool(x))
    g = np.asarray(jax.random.normal(jax.random.key(1), y.shape))
    dx = np.asarray(jax.vjp(image_models.max_pool, jnp.asarray(x))[1](jnp.asarray(g))[0])
    expected = np.zeros_like(x)
    for n, i, j, c in np.ndindex(*y.shape):
        here = (n, slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2), c)
        largest = x[here] == y[n, i, j, c]
        expected[here] = largest * g[n, i, j, c] / largest.sum()
    np.testing.assert_allclose(dx, expected, rtol=1e-6)
    assert np.count_nonzero(expected) > y.size  # there were ties


@pytest.mark.parametrize("channels", [1, 3])
def test_convolve_is_the_layer_and_so_are_its_gradients(channels):
    layer = nnx.Conv(channels, 5, (3, 3), use_bias=False, rngs=RNGS)
    x = jax.random.normal(jax.random.key(0), (2, 9, 7, channels))
    g = jax.random.normal(jax.random.key(1), (2, 9, 7, 5))
    graph, kernel = nnx.split(layer)
    both = lambda f: jax.vjp(lambda kernel, x: f(nnx.merge(graph, kernel), x), kernel, x)
    (y, pull), (expected, pull_expected) = (
        both(image_models.convolve),
        both(lambda layer, x: layer(x)),
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, (y, pull(g)), (expected, pull_expected(g)))


def test_the_stage_of_the_cnn_is_convolution_bias_relu_pool():
    stage = image_models.ConvolutionPool(2, 5, rngs=RNGS)
    stage.bias[...] = jnp.linspace(-1, 1, 5)
    x = jax.random.normal(jax.random.key(0), (2, 8, 6, 2))
    usual = _window(nnx.relu(stage.convolution(x) + stage.bias[...][None, None, None]))
    np.testing.assert_allclose(stage(x), usual, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "shape", "parameters"),
    [
        (
            image_models.MLP(64, (16, 8), 10, rngs=RNGS),
            (2, 8, 8, 1),
            64 * 16 + 16 * 8 + 8 * 10 + 34,
        ),
        (image_models.MLP(64, (), 10, rngs=RNGS), (2, 8, 8, 1), 650),
        (
            image_models.CNN((28, 28, 1), (4, 6), 12, 10, rngs=RNGS),
            (2, 28, 28, 1),
            9 * 4 + 4 + 9 * 24 + 6 + 49 * 6 * 12 + 12 + 130,
        ),
        (
            image_models.ResNet((32, 32, 3), (4, 8), 1, 10, rngs=RNGS),
            (2, 32, 32, 3),
            108 + 8 + (288 + 16) + (288 + 576 + 32 + 32) + 90,
        ),
        (image_models.Discriminator(4, (28, 28, 1), rngs=RNGS), (2, 28, 28, 1), 68 + 520 + 393),
    ],
)
def test_shapes_and_parameter_counts(model, shape, parameters):
    logits = model(jnp.ones(shape))
    assert logits.shape[0] == shape[0]
    assert logits.shape[1:] in ((10,), ())
    counted = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert counted == parameters


def test_generator_makes_images():
    images = image_models.Generator(5, 4, (28, 28, 3), rngs=RNGS)(jnp.ones((2, 5)))
    assert images.shape == (2, 28, 28, 3)
    assert np.all(np.abs(images) <= 1)


def test_gru_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    model = gru.GRU(7, 4, 5, rngs=RNGS)
    model.recurrent_bias[...] = jax.random.normal(jax.random.key(1), (15,))
    model.inputs.bias[...] = jax.random.normal(jax.random.key(2), (15,))
    other = torch.nn.GRU(4, 5, batch_first=True)
    tensor = lambda x: torch.tensor(np.asarray(x))
    with torch.no_grad():
        other.weight_ih_l0.copy_(tensor(model.inputs.kernel[...]).T)
        other.weight_hh_l0.copy_(tensor(model.recurrent.kernel[...]).T)
        other.bias_ih_l0.copy_(tensor(model.inputs.bias[...]))
        other.bias_hh_l0.copy_(tensor(model.recurrent_bias[...]))
        codes = jnp.array([[0, 3, 6, 2], [5, 5, 1, 0]])
        hidden, last = other(tensor(model.embed(codes)))
    logits, state = model(codes, model.initial_state(2))
    np.testing.assert_allclose(state, last[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, model.logits(jnp.asarray(hidden)), rtol=1e-4, atol=1e-5)


def test_gradient_of_the_gru_is_that_of_its_definition():
    def definition(kernels, biases, gates, state):
        def step(h, gate):
            mixed = [h @ kernel + bias[None] for kernel, bias in zip(kernels, biases, strict=True)]
            reset, update = nnx.sigmoid(gate[0] + mixed[0]), nnx.sigmoid(gate[1] + mixed[1])
            h = (1 - update) * jnp.tanh(gate[2] + reset * mixed[2]) + update * h
            return h, h

        return jax.lax.scan(step, state, gates)[1]

    keys = iter(jax.random.split(jax.random.key(0), 20))
    draw = lambda *shape: tuple(jax.random.normal(next(keys), shape) for _ in range(3))
    arguments = draw(5, 5), draw(5), draw(7, 2, 5), draw(2, 5)[0]
    (weights, *_) = draw(7, 2, 5)
    gradient = lambda f: jax.grad(lambda args: jnp.sum(weights * f(*args)))(arguments)
    chex.assert_trees_all_close(
        gradient(gru.recurrence), gradient(definition), rtol=1e-5, atol=1e-6
    )


def test_a_block_of_the_transformer_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    block = transformer.Block(6, 2, 1, rngs=RNGS)
    keys = iter(jax.random.split(jax.random.key(0), 50))
    params = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), nnx.state(block))
    nnx.update(block, params)
    gelu = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    other = torch.nn.TransformerEncoderLayer(
        6, 2, 24, dropout=0.0, activation=gelu, layer_norm_eps=1e-6, batch_first=True,
        norm_first=True,
    )  # fmt: skip
    tensor = lambda x: torch.tensor(np.asarray(x[...]))
    projections = block.queries, block.keys, block.values
    with torch.no_grad():
        attention = other.self_attn
        attention.in_proj_weight.copy_(torch.cat([tensor(p.kernel).T for p in projections]))
        attention.in_proj_bias.zero_()
        pairs = (attention.out_proj, block.mixed), (other.linear1, block.hidden)
        for layer, ours in (*pairs, (other.linear2, block.output)):
            layer.weight.copy_(tensor(ours.kernel).T)
            layer.bias.copy_(tensor(ours.bias))
        norms = (other.norm1, block.before_attention), (other.norm2, block.before_perceptron)
        for norm, ours in norms:
            norm.weight.copy_(tensor(ours.scale))
            norm.bias.copy_(tensor(ours.bias))
        x = jax.random.normal(next(keys), (3, 5, 6))
        mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
        expected = other(torch.tensor(np.asarray(x)), src_mask=mask, is_causal=True)
    np.testing.assert_allclose(block(x), expected, rtol=1e-4, atol=1e-4)


CODES = jax.random.randint(jax.random.key(4), (2, 8), 0, 7)


def small_transformer():
    return transformer.Transformer(7, 8, 12, 3, 2, rngs=nnx.Rngs(0))


def test_the_transformer_sees_no_later_character():
    model = small_transformer()
    state = model.initial_state(2)
    logits, _ = model(CODES, state)
    assert logits.shape == (2, 8, 7)
    for time in range(8):
        other, _ = model(CODES.at[:, time].set((CODES[:, time] + 1) % 7), state)
        changed = np.any(np.asarray(other != logits), axis=(0, 2))
        np.testing.assert_array_equal(changed, np.arange(8) >= time)


def test_the_transformer_continues_a_text():
    """Its state is the last window: one more character is the end of the shifted window."""
    model = small_transformer()
    _, state = model(CODES, model.initial_state(2))
    more = jnp.array([[3], [5]])
    logits, after = model(more, state)
    shifted = jnp.concatenate([CODES[:, 1:], more], axis=1)
    np.testing.assert_array_equal(after, shifted)
    whole, _ = model(shifted, model.initial_state(2))
    np.testing.assert_allclose(logits, whole[:, -1:], rtol=1e-5, atol=1e-6)


IMAGES = jax.random.randint(jax.random.key(3), (64, 6, 5, 1), 1, 255).astype(jnp.uint8)


def test_flip_mirrors_about_half():
    flipped = augment.random_flip(jax.random.key(0), IMAGES)
    mirrored = np.all(np.asarray(flipped == IMAGES[:, :, ::-1]), axis=(1, 2, 3))
    kept = np.all(np.asarray(flipped == IMAGES), axis=(1, 2, 3))
    assert np.all(mirrored | kept)
    assert 16 < mirrored.sum() < 48


def test_shift_moves_each_image_by_its_own_offset():
    shifted = np.asarray(augment.random_shift(jax.random.key(0), IMAGES, 2))
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)))
    offsets = set()
    for image, source in zip(shifted, padded, strict=True):
        found = [
            (i, j) for i in range(5) for j in range(5)
            if np.array_equal(source[i : i + 6, j : j + 5], image)
        ]  # fmt: skip
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) > 15


@pytest.mark.slow
def test_zoom_keeps_size_and_range():
    zoomed = augment.random_zoom(jax.random.key(0), IMAGES, 0.3)
    assert zoomed.shape == IMAGES.shape
    assert IMAGES.min() - 1 <= zoomed.min()
    assert zoomed.max() <= IMAGES.max() + 1
    ramp = jnp.broadcast_to(jnp.arange(16.0)[None, :, None, None], (8, 16, 16, 1))
    slopes = np.diff(np.asarray(augment.random_zoom(jax.random.key(1), ramp, 0.4))[:, 4:12], axis=1)
    assert np.all(slopes > 0.55)  # a crop of 60 % to 100 %, scaled back, is that much flatter
    assert np.all(slopes < 1.01)
    assert slopes.min() < 0.8


@pytest.mark.parametrize(
    "change", [augment.random_flip, lambda k, x: augment.random_shift(k, x, 1)]
)
def test_augmentation_follows_from_its_key(change):
    one, two = jax.random.key(0), jax.random.key(1)
    np.testing.assert_array_equal(change(one, IMAGES), change(one, IMAGES))
    assert not np.array_equal(change(one, IMAGES), change(two, IMAGES))
