"""Install the package that lies here, from a wheel, as pip does it for users."""

import subprocess
import sys
import zipfile
from pathlib import Path

METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: other-models\nVersion: 1.0\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "entry_points.txt": "[txl_dist.models]\nrecurrent = other_models.recurrent:Recurrent\n",
    "RECORD": "",
}


def install(folder):
    """Return the folder in which pip has installed the package: a path for PYTHONPATH."""
    wheel = folder / "other_models-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted(Path(__file__).parent.glob("other_models/**/*.*")):
            if path.suffix in (".py", ".yaml"):
                archive.write(path, path.relative_to(Path(__file__).parent))
        for name, content in METADATA.items():
            archive.writestr(f"other_models-1.0.dist-info/{name}", content)
    options = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", "--root-user-action=ignore"]
    pip = [sys.executable, "-m", "pip", "install", *options, f"--target={folder / 'site'}", str(wheel)]
    subprocess.run(pip, check=True)
    return folder / "site"
