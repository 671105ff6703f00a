//! What the tables and the fuzz target share: a gateway that calls nobody, its settings, and what
//! comes to it.

// The datagrams are read and written by the mote's hand-made codec, for the gateway's own cannot
// judge itself.
#[allow(dead_code)]
#[path = "../support/firmware.rs"]
pub mod firmware;
#[allow(dead_code)]
#[path = "../support/mote.rs"]
pub mod mote;

use std::process;

use super::*;

// As in the firmware's datagrams.
pub const URL: &str = "https://api.telegram.org/bot";
pub const TOKEN: &str = "123456789:AAEaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
pub const MOTE_TOKEN: &str = "mesh";
pub const PASSWORD: &str = "geheim";

pub fn secret(text: &str) -> Secret {
    Secret(text.to_string())
}

fn folders(folder: &Path) -> Folders {
    Folders {
        config_ini: folder.join("config.ini"),
        dot_env: folder.join(".env"),
        state: folder.into(),
        log: folder.into(),
        belong_to_another: false,
    }
}

pub fn config(token: Option<&str>) -> Config {
    let mut config = Config::new(&folders(Path::new("")));
    config.token = token.map(secret);
    config.mote_token = token.map(|_| secret(MOTE_TOKEN));
    config.password = Some(secret(PASSWORD));
    config
}

pub fn gateway(token: Option<&str>) -> Gateway {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    Gateway::new(config(token), State::default(), socket)
}

pub fn peer(number: u8) -> SocketAddr {
    ([10, 0, 0, number], 61616).into()
}

/// Bot API, `Message`: somebody writes to the bot.
pub fn message(chat: i64, name: &str, text: &str) -> Value {
    let chat = json!({"id": chat, "type": "private", "first_name": name});
    json!({"message_id": 1, "date": 1_769_860_800, "chat": chat, "text": text})
}

/// Bot API, `Update`.
pub fn update(message: Value) -> Value {
    json!({"update_id": 1, "message": message})
}

/// A folder that is deleted at the end.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Scratch {
        static FOLDERS: AtomicU64 = AtomicU64::new(0);
        let number = FOLDERS.fetch_add(1, Relaxed);
        let name = format!("coap_websocket-unit-{}-{number}", process::id());
        let folder = env::temp_dir().join(name);
        fs::create_dir(&folder).unwrap();
        Scratch(folder)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Reads both files of settings as the start does, without the environment of whoever runs the
/// tests. A fault is told as in `config.ini:3: no section yet`.
pub fn config_of(config_ini: &[u8], dot_env: &[u8]) -> Result<Config, String> {
    let scratch = Scratch::new();
    let folders = folders(&scratch.0);
    fs::write(&folders.config_ini, config_ini).unwrap();
    fs::write(&folders.dot_env, dot_env).unwrap();
    Config::load(&folders, Vec::new()).map_err(|fault| {
        let place = format!("{}/", scratch.0.display());
        assert!(fault.starts_with(&place), "{fault}");
        fault.replace(&place, "")
    })
}
