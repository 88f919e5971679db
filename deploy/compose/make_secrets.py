"""Makes the secrets of the compose stack once; a folder that has them is left as it is."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Final

_REDIS_CONF: Final = """\
requirepass {password}
appendonly yes
appendfsync everysec
maxmemory 512mb
maxmemory-policy noeviction
dir /data
"""


def main() -> None:
    """Write the shared secret, the password of Redis and its configuration."""
    folder = Path(sys.argv[1])
    password = folder / "redis-password"
    if password.exists():
        return
    (folder / "leyline").write_text(secrets.token_hex(32))
    text = secrets.token_hex(24)
    (folder / "redis.conf").write_text(_REDIS_CONF.format(password=text))
    # Last, because its presence says that all of it is there.
    password.write_text(text)
    for path in folder.iterdir():
        # Redis and the service run as different users; the volume is mounted nowhere else.
        path.chmod(0o444)


if __name__ == "__main__":
    main()
