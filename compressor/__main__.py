"""`compress` and `python -m compressor`: exit codes, and one line where a person made a mistake."""

from __future__ import annotations

import os
import sys
import traceback


def main() -> None:
    """Run the command line and exit: 0 done, 1 a fault of ours, 2 the user's mistake, 130 interrupted."""
    from compressor.errors import CompressorError, Interrupted

    try:
        from compressor.cli.app import app

        app(prog_name="compress")
    except CompressorError as error:
        if os.environ.get("COMPRESSOR_DEBUG"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt):
        print("interrupted; nothing was left half-written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
