import subprocess
import sys


def test_the_api_process_imports_no_torch():
    code = "import sys, llmopt.serve.lifecycle, llmopt.cli.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command_lines_help_imports_no_server():
    code = "import sys, llmopt.cli.serve; sys.exit(bool({'fastapi', 'uvicorn', 'llmopt.serve.app'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
