from __future__ import annotations

from pathlib import Path

from vlm_doctor.machine import FileSetting
from vlm_doctor.sources.nccl_files import read_nccl_files


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_both_files_the_users_own_first(tmp_path: Path) -> None:
    write(tmp_path, "etc/nccl.conf", "NCCL_DEBUG=WARN\nNCCL_SOCKET_IFNAME==ens1f0\n")
    write(tmp_path, "home/ada/.nccl.conf", "# mine\nNCCL_P2P_DISABLE = 1 # why?\nPATH=/x\nNCCL_TOKEN=secret\nNCCL_IB_HCA\n")
    assert read_nccl_files(tmp_path, {"HOME": "/home/ada"}) == (
        FileSetting(name="NCCL_P2P_DISABLE", value="1", file="~/.nccl.conf"),
        FileSetting(name="NCCL_DEBUG", value="WARN", file="/etc/nccl.conf"),
        FileSetting(name="NCCL_SOCKET_IFNAME", value="=ens1f0", file="/etc/nccl.conf"),
    )


def test_a_file_that_the_environment_names(tmp_path: Path) -> None:
    write(tmp_path, "home/ada/cluster.conf", "NCCL_DEBUG=INFO\n" * 300)
    write(tmp_path, "home/ada/.nccl.conf", "NCCL_DEBUG=TRACE\n")
    found = read_nccl_files(tmp_path, {"HOME": "/home/ada", "NCCL_CONF_FILE": "~/cluster.conf"})
    assert {setting.value for setting in found} == {"INFO"}
    assert len(found) == 100


def test_no_file_no_home_and_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "etc/nccl.conf").mkdir(parents=True)
    assert read_nccl_files(tmp_path, {}) == ()
