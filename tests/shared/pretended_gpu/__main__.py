"""pytest in a process that sees the H200: python -m pretended_gpu [pytest's arguments]."""

import sys

import pretended_gpu

pretended_gpu.pretend()

import pytest  # noqa: E402

sys.exit(pytest.main())
