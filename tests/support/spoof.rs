//! Datagrams from addresses that the sender does not have. It takes Python, and a network namespace of one's own.

use std::net::{Ipv6Addr, SocketAddr};
use std::process::Command;

use super::needs::{has_client, in_namespaces};

/// The target's address and port, the payload in hexadecimal digits, the sources.
const SEND: &str = r#"
import socket, struct, sys
host, port, payload, *sources = sys.argv[1:]
port, payload = int(port), bytes.fromhex(payload)
target, length = socket.inet_pton(socket.AF_INET6, host), 8 + len(payload)
sender = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
for source in sources:
    source = socket.inet_pton(socket.AF_INET6, source)
    def udp(checksum):
        return struct.pack("!4H", 5683, port, length, checksum) + payload
    whole = source + target + struct.pack("!2I", length, 17) + udp(0) + bytes(length % 2)
    total = sum(struct.unpack("!%dH" % (len(whole) // 2), whole))
    while total > 0xffff:
        total = (total & 0xffff) + (total >> 16)
    packet = struct.pack("!IHBB", 6 << 28, length, 17, 64) + source + target + udp(~total & 0xffff or 0xffff)
    sender.sendto(packet, (host, 0))
"#;

/// Skips a test that cannot do this here, and runs it in namespaces; true if it is that run.
pub fn can_send_from<Test: Fn() + Copy>(test: Test) -> bool {
    let python = Command::new("python3").arg("--version").output();
    has_client(test, "python3", python.is_ok()) && in_namespaces(test)
}

/// Sends a datagram from port 5683 of each of these addresses.
#[track_caller]
pub fn send_from(sources: &[Ipv6Addr], target: SocketAddr, payload: &[u8]) {
    let digits: String = payload.iter().map(|b| format!("{b:02x}")).collect();
    let mut python = Command::new("python3");
    python.args(["-c", SEND, &target.ip().to_string()]);
    python.args([&target.port().to_string(), &digits]);
    let status = python
        .args(sources.iter().map(Ipv6Addr::to_string))
        .status();
    assert!(status.unwrap().success(), "python3");
}
