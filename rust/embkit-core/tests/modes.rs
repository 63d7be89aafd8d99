//! Modes follow the umask. Alone in its file: the umask belongs to the whole process.

use embkit_core::publish::publish_file;
use rustix::fs::Mode;
use std::fs;
use std::os::unix::fs::PermissionsExt;

#[test]
fn modes_follow_the_umask_and_a_replaced_file_keeps_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let mode =
        |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
    for (umask, want) in [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)] {
        let old = rustix::process::umask(Mode::from_raw_mode(umask));
        let name = format!("new-{umask:o}");
        publish_file(&dir.path().join(&name), b"x").unwrap();
        publish_file(&dir.path().join("kept"), b"x").unwrap();
        if umask == 0o022 {
            let private = fs::Permissions::from_mode(0o640);
            fs::set_permissions(dir.path().join("kept"), private).unwrap();
        } else {
            assert_eq!(mode("kept"), 0o640);
        }
        rustix::process::umask(old);
        assert_eq!(mode(&name), want, "umask {umask:o}");
    }
}
