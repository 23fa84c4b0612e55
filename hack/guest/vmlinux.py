#!/usr/bin/env python3
"""vmlinux.py BZIMAGE OUT: takes the plain ELF kernel out of a bzImage.

QEMU boots the ELF through PVH at once; under emulation the bzImage's own unpacking takes seconds. The fields are those of
the boot protocol (Documentation/arch/x86/boot.rst): setup_sects, payload_offset and payload_length.
"""

import lzma
import struct
import subprocess
import sys

image = open(sys.argv[1], "rb").read()
setup = ((image[0x1F1] or 4) + 1) * 512
offset, length = struct.unpack_from("<II", image, 0x248)
payload = image[setup + offset : setup + offset + length]
if payload[:6] == b"\xfd7zXZ\0":
    kernel = lzma.LZMADecompressor().decompress(payload)
elif payload[:4] == b"\x28\xb5\x2f\xfd":
    # The last four bytes are the size.
    kernel = subprocess.run(["zstd", "-dcq"], input=payload[:-4], stdout=subprocess.PIPE, check=True).stdout
elif payload[:4] == b"\x02\x21\x4c\x18":
    kernel = subprocess.run(["lz4", "-dcq"], input=payload[:-4], stdout=subprocess.PIPE, check=True).stdout
else:
    sys.exit(f"{sys.argv[1]}: unknown compression, payload starts with {payload[:8]!r}")
if kernel[:4] != b"\x7fELF":
    sys.exit(f"{sys.argv[1]}: no ELF inside")
open(sys.argv[2], "wb").write(kernel)
