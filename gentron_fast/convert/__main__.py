"""python -m gentron_fast.convert"""

import sys

from gentron_fast.convert.pipelines import main

sys.exit(main())
