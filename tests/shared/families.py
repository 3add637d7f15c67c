"""The models of the family that guidance is tested on, and how far two tensors are apart."""

# What differs between the models of the family, as changes of the tiny configuration.
FAMILY = {
    "both encoders": {},
    "clip": {"encoders": ("clip",)},
    "t5": {"encoders": ("t5",)},
    "adaLN-zero": {"encoders": ("clip",), "cross_attention": False},
    "images": {"temporal": False},
    "heads of XL/2": {"width": 144, "heads": 2},
    "heads of G/2": {"width": 208, "heads": 2},
    "PixArt": {
        "encoders": ("t5",),
        "cross_norm": False,
        "caption_projection": True,
        "pooled_text": False,
        "final_table": True,
        "learned_range": True,
        "size_embedding": True,
    },
}


def relative(value, expected):
    value, expected = value.double(), expected.double()
    return ((value - expected).norm() / expected.norm()).item()
