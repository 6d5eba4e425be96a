"""`python -m sae_nfm`, the same as `sae-nfm`."""

import sys

from sae_nfm_cli import main

sys.exit(main())
