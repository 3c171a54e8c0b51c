"""Checks array signatures of `model` at run time here too.

The hook works on modules not yet imported, and these tests may be the first to import them.
"""

import jaxtyping

jaxtyping.install_import_hook("model", "beartype.beartype")
