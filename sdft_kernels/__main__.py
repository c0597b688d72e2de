"""``python -m sdft_kernels``: the same as the console script ``sdft-kernels``."""

from sdft_kernels.cli.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
