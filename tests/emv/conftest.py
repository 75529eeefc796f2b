from __future__ import annotations

from hypothesis import settings

# No test depends on how fast a machine is.
settings.register_profile("emv", deadline=None)
settings.load_profile("emv")
