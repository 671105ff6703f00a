//! What a test needs of the machine. Where that is missing it is skipped by name and with the reason, which stands below
//! the test results; where `REQUIRE_NAMESPACES` or `REQUIRE_CLIENTS` is set, as in `.ci/run`, it fails.

use std::any::type_name;
use std::process::Command;
use std::sync::Mutex;
use std::{env, io};

use super::loopback;

static SKIPPED: Mutex<Vec<String>> = Mutex::new(Vec::new());

unsafe extern "C" {
    /// libc's: the test harness has no last words of its own.
    safe fn atexit(function: extern "C" fn()) -> i32;
}

extern "C" fn tell_skipped() {
    let mut skipped = SKIPPED.lock().unwrap();
    skipped.sort();
    eprintln!("skipped: {}", skipped.len());
    skipped.iter().for_each(|line| eprintln!("  {line}"));
    eprintln!();
}

/// Says that a test is skipped, or fails if what it needs is required here.
fn skip(test: &str, reason: &str, required: &str) {
    assert!(env::var_os(required).is_none(), "{reason}");
    let mut skipped = SKIPPED.lock().unwrap();
    if skipped.is_empty() {
        atexit(tell_skipped);
    }
    skipped.push(format!("{test}: {reason}"));
}

/// The name of a test as the harness knows it: `config::installed`.
fn name_of<Test>(_: Test) -> &'static str {
    let (_program, name) = type_name::<Test>().split_once("::").expect("a test");
    name
}

/// Runs a program, which must succeed; blanks part its arguments.
#[track_caller]
pub fn run(program: &str, arguments: &str) {
    let status = Command::new(program).args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "{program} {arguments}");
}

/// Runs a command; if it cannot be run or fails, says why in a line.
fn try_to_run(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("{program} is not installed"),
        _ => format!("{program}: {error}"),
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.trim().lines().last();
    Err(last.map_or(format!("{program}: {}", output.status), str::to_string))
}

/// Skips a test whose client is not installed; returns whether it is.
pub fn has_client<Test: Fn()>(test: Test, client: &str, is_installed: bool) -> bool {
    if !is_installed {
        let reason = format!("{client} is not installed");
        skip(name_of(test), &reason, "REQUIRE_CLIENTS");
    }
    is_installed
}

/// Skips a test where this machine does not speak IPv6; returns whether it does.
pub fn has_ipv6<Test: Fn()>(test: Test) -> bool {
    let is_there = loopback().is_ipv6();
    if !is_there {
        skip(name_of(test), "there is no ::1", "REQUIRE_NAMESPACES");
    }
    is_there
}

/// Runs a test of this program again as root in a network and a mount namespace of its own; true if it is that run.
pub fn in_namespaces<Test: Fn()>(test: Test) -> bool {
    if env::var_os("IN_NAMESPACES").is_some() {
        return true;
    }
    let name = name_of(test);
    match namespaces() {
        Ok(mut unshare) => {
            let this = env::current_exe().expect("path of this program");
            unshare
                .arg(this)
                .args(["--include-ignored", "--exact", name]);
            let output = unshare
                .env("IN_NAMESPACES", name)
                .output()
                .expect("unshare");
            println!("{}", String::from_utf8_lossy(&output.stdout));
            println!("{}", String::from_utf8_lossy(&output.stderr));
            assert!(
                output.status.success(),
                "failed in its namespaces, see above"
            );
        }
        Err(reason) => skip(
            name,
            &format!("no namespaces: {reason}"),
            "REQUIRE_NAMESPACES",
        ),
    }
    false
}

/// The command that runs another one in namespaces, with a loopback device that is up.
fn namespaces() -> Result<Command, String> {
    let unshare = |user: &[&str]| {
        let mut command = Command::new("unshare");
        command
            .args(["--net", "--mount"])
            .args(user)
            .args(["--", "sh", "-ec"]);
        command
    };
    let set_up = "ip link set lo up; mount -t tmpfs tmpfs /mnt; umount /mnt";
    let mut reason = String::new();
    for user in [&[][..], &["--map-root-user"]] {
        match try_to_run(unshare(user).arg(set_up)) {
            Ok(()) => {
                let mut command = unshare(user);
                command.args([r#"ip link set lo up; exec "$@""#, "sh"]);
                return Ok(command);
            }
            Err(error) => reason = error,
        }
    }
    Err(reason)
}
