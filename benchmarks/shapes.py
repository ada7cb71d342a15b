"""Parameter shapes of the optimizers' benchmarks."""

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """He et al. 2015, with BatchNorm's scales and biases: 25,557,032 parameters."""
    shapes: Shapes = [(7, 7, 3, 64), (64,), (64,)]
    width_in = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            for kernel in ((1, 1, width_in, width), (3, 3, width, width), (1, 1, width, 4 * width)):
                shapes += [kernel, kernel[-1:], kernel[-1:]]
            if block == 0:
                shapes += [(1, 1, width_in, 4 * width), (4 * width,), (4 * width,)]
            width_in = 4 * width
    return [*shapes, (2048, 1000), (1000,)]


def gpt2_small() -> Shapes:
    """Radford et al. 2019, embedding and head tied: 124,439,808 parameters."""
    width = 768
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    blocks = 12 * (norm + attention + norm + mlp)
    return [(50257, width), (1024, width), *blocks, *norm]


SHAPES: dict[str, Shapes] = {
    "one leaf of 20 M": [(5000, 4000)],
    "500 of 64 x 64": [(64, 64)] * 500,
    "ResNet-50": resnet50(),
    "GPT-2 small": gpt2_small(),
    "2,000 tiny": [(8,), (4, 4)] * 1000,
}
FEWER: dict[str, Shapes] = {f"{n:,} tiny": [(8,), (4, 4)] * (n // 2) for n in (500, 1000)}
