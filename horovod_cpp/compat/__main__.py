"""``python -m horovod_cpp.compat``."""

import sys

from horovod_cpp.compat._run import main

if __name__ == "__main__":
    main(sys.argv[1:])
