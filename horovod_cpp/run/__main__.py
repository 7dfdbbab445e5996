"""``python -m horovod_cpp.run``, the same as ``hvdrun``."""

import sys

from horovod_cpp.run.command import main

sys.exit(main())
