"""Latents and text embeddings ahead of training: python -m gentron_train.precompute"""

import sys

from gentron_train.data.precompute import main

if __name__ == "__main__":
    sys.exit(main())
