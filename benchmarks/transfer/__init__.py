"""Speed of KV transfer: links beside raw NIXL, Mooncake and memcpy, and the part of TTFT that a transfer costs."""
