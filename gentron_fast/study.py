"""Two models judged side by side by people: python -m gentron_fast.study make|serve|report."""

import sys

from gentron_fast.evaluation.study import main

if __name__ == "__main__":
    sys.exit(main())
