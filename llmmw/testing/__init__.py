"""What users test with: a manual clock and loop, a fake upstream, layer contracts, the embedded model server."""

from llmmw.testing.clock import ManualClock, ManualLoop, manual_time
from llmmw.testing.fake import FakeUpstream, chat_call

__all__ = ["FakeUpstream", "ManualClock", "ManualLoop", "chat_call", "manual_time"]
