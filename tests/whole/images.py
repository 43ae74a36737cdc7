"""Images that tests make, each the same at every run."""

import functools
import io

import numpy as np
from PIL import Image


def saved(image, form, **options):
    """The octets of an image in a format."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def gradient(seed, size=(96, 64)):
    """A picture of colours that change slowly under noise."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([255 * x / width, 255 * y / height,
                       255 * (x + y) / (width + height)], -1)
    grain = np.random.default_rng(seed).normal(0, 12, (height, width, 1))
    return Image.fromarray(np.clip(slopes + grain, 0, 255).astype(np.uint8))


@functools.cache
def photograph(seed, size=(96, 64)):
    """Such a picture as a JPEG."""
    return saved(gradient(seed, size), "JPEG", quality=92)


def animation():
    """A GIF of colours that take each other's places."""
    frames = [Image.linear_gradient("L").rotate(30 * n).resize((48, 48))
              for n in range(6)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:],
                 loop=0, duration=100)
