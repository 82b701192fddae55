"""The command `dalle-reference`: what it imports, it imports where Ctrl-C and a missing extra have an answer."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from dalle_reference import cli
    except KeyboardInterrupt:
        print("dalle-reference: stopped", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        print(
            f"dalle-reference: {error.name} is not installed; pip install 'dalle_kernels[reference]' brings it",
            file=sys.stderr,
        )
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
