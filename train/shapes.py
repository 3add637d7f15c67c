"""Write the small world's shards: python -m gentron_train.shapes OUT"""

import sys

from gentron_train.small_world.renderer import main

if __name__ == "__main__":
    sys.exit(main())
