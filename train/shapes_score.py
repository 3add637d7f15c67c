"""Score a pipeline in the small world: python -m gentron_train.shapes_score PIPELINE"""

import sys

from gentron_train.small_world.evaluator import main

if __name__ == "__main__":
    sys.exit(main())
