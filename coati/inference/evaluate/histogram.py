"""A histogram of several groups as a picture, drawn with Pillow alone."""

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 960, 480, 70, 60, 50
# Told apart by people who cannot tell red from green (Okabe and Ito), half transparent where they
# overlap.
COLORS = ((0, 114, 178, 150), (213, 94, 0, 150), (0, 158, 115, 150), (120, 120, 120, 150))


def draw(counts: dict[str, list[int]], low: float, high: float) -> Image.Image:
    """``counts``: group -> numbers in equal bins from ``low`` to ``high``."""
    image = Image.new("RGBA", (WIDTH, HEIGHT), "white")
    font = ImageFont.load_default(16)
    most = max(1, max(max(values) for values in counts.values()))
    for (name, values), color, index in zip(
        counts.items(), COLORS, range(len(COLORS)), strict=False
    ):
        layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
        pen = ImageDraw.Draw(layer)
        for number, count in enumerate(values):
            if count:
                left, right = (_x(number + step, len(values)) for step in (0, 1))
                pen.rectangle([left, _y(count, most), right - 1, HEIGHT - BOTTOM], fill=color)
        at = LEFT + 10 + 220 * index
        pen.rectangle([at, 16, at + 16, 32], fill=color)
        pen.text((at + 24, 15), f"{name} ({sum(values)})", fill="black", font=font)
        image = Image.alpha_composite(image, layer)
    _axes(ImageDraw.Draw(image), font, most, low, high)
    return image.convert("RGB")


def _x(step: int, steps: int) -> int:
    return LEFT + (WIDTH - LEFT - 30) * step // steps


def _y(count: int, most: int) -> int:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * count // most


def _axes(pen: ImageDraw.ImageDraw, font, most: int, low: float, high: float) -> None:
    pen.line([LEFT, TOP, LEFT, HEIGHT - BOTTOM, WIDTH - 30, HEIGHT - BOTTOM], fill="black", width=2)
    for part in range(5):
        x = _x(part, 4)
        pen.line([x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 6], fill="black", width=2)
        value = f"{low + (high - low) * part / 4:.2f}"
        pen.text((x, HEIGHT - BOTTOM + 10), value, fill="black", font=font, anchor="ma")
    for count in sorted({0, most // 2, most}):
        pen.text((LEFT - 8, _y(count, most)), str(count), fill="black", font=font, anchor="rm")
    pen.text(
        (LEFT + (WIDTH - LEFT - 30) // 2, HEIGHT - 14),
        "score",
        fill="black",
        font=font,
        anchor="ms",
    )
