//! A name server that knows one address for every name, and is late or silent if told so.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::TempDir;

/// What a name server does with questions.
#[derive(Clone, Copy)]
pub enum Names {
    Lead(Ipv4Addr),
    Refused,
    /// There is no response at all.
    Silent,
}

/// For a test in a network and a mount namespace of its own. It ends with the process.
pub struct NameServer {
    behaviour: Arc<Mutex<Behaviour>>,
}

#[derive(Clone, Copy)]
struct Behaviour {
    names: Names,
    delay: Duration,
    questions: usize,
}

impl NameServer {
    /// `options` are further lines of `resolv.conf`.
    pub fn start(names: Names, options: &str) -> Self {
        let directory = TempDir::new();
        let resolv_conf = directory.join("resolv.conf");
        fs::write(&resolv_conf, format!("nameserver 127.0.0.53\n{options}\n")).unwrap();
        let mut mount = Command::new("mount");
        mount.arg("--bind").arg(resolv_conf).arg("/etc/resolv.conf");
        assert!(mount.status().unwrap().success(), "mount");
        let socket = UdpSocket::bind("127.0.0.53:53").unwrap();
        let behaviour = Arc::new(Mutex::new(Behaviour {
            names,
            delay: Duration::ZERO,
            questions: 0,
        }));
        let shared = Arc::clone(&behaviour);
        thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                let mut behaviour = shared.lock().unwrap();
                behaviour.questions += 1;
                let Behaviour { names, delay, .. } = *behaviour;
                drop(behaviour);
                let Some(response) = answer(&buffer[..length], names) else {
                    continue;
                };
                let socket = socket.try_clone().unwrap();
                thread::spawn(move || {
                    thread::sleep(delay);
                    let _ = socket.send_to(&response, peer);
                });
            }
        });
        Self { behaviour }
    }

    /// What it does from now on.
    pub fn set(&self, names: Names) {
        self.behaviour.lock().unwrap().names = names;
    }

    /// How late its answers are from now on.
    pub fn is_late(&self, delay: Duration) {
        self.behaviour.lock().unwrap().delay = delay;
    }

    pub fn questions(&self) -> usize {
        self.behaviour.lock().unwrap().questions
    }
}

/// RFC 1035 §4.1: an address only for a question for one of IPv4.
fn answer(query: &[u8], names: Names) -> Option<Vec<u8>> {
    const RECURSIVE_RESPONSE: u16 = 0x8180;
    const REFUSED: u16 = 5;
    let name_end = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap();
    let (kind, question_end) = (query[name_end + 2], name_end + 5);
    let (code, address) = match names {
        Names::Lead(address) => (0, (kind == 1).then_some(address)),
        Names::Refused => (REFUSED, None),
        Names::Silent => return None,
    };
    let mut response = query[..2].to_vec();
    let answers = u16::from(address.is_some());
    for field in [RECURSIVE_RESPONSE | code, 1, answers, 0, 0] {
        response.extend(field.to_be_bytes());
    }
    response.extend(&query[12..question_end]);
    if let Some(address) = address {
        // The name of the question, IPv4, Internet, for a second, four bytes.
        response.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
        response.extend(address.octets());
    }
    Some(response)
}
