//! The one model of the unmodified firmware: what a mote keeps of the replies that it gets. Nothing here sends or
//! waits; the fuzz target includes this file, too.

/// The longest reply that the firmware accepts, in bytes.
pub const REPLY_MAX: usize = 302;
const SLOTS: usize = 10;
const NAME_MAX: usize = 14;
const ID_MAX: usize = 11;

/// A mote's RAM.
#[derive(Clone, Debug, Default)]
pub struct Firmware {
    /// None: as built in.
    pub interval: Option<u32>,
    /// None: as built in.
    pub feedback: Option<bool>,
    slots: [Option<User>; SLOTS],
}

#[derive(Clone, Debug)]
struct User {
    name: Vec<u8>,
    id: Vec<u8>,
}

impl Firmware {
    /// The power was cut: it knows only what was built in.
    pub fn reboot(&mut self) {
        *self = Self::default();
    }

    /// Reads the payload of a separate response, whatever its code is. Panics where the firmware crashes.
    pub fn take(&mut self, reply: &str) {
        if reply.len() > REPLY_MAX || ["Messages sent successfully", "No Updates"].contains(&reply)
        {
            return;
        }
        for token in reply.split(';').filter(|token| !token.is_empty()) {
            self.take_token(token);
        }
    }

    /// The first letter decides, also about a user who is named like a setting.
    fn take_token(&mut self, token: &str) {
        match token.as_bytes() {
            [b'i', digits @ ..] if starts_with_digit(digits) => {
                self.interval = Some(leading_number(digits));
            }
            [b'f', on @ (b'0' | b'1'), ..] => self.feedback = Some(*on == b'1'),
            [b'r', whom @ ..] if starts_with_digit(whom) => self.remove(whom),
            _ => match token.split_once(':') {
                Some((name, id)) => self.add(name.as_bytes(), id.as_bytes()),
                None => panic!("the firmware crashes: no colon in {token:?}"),
            },
        }
    }

    fn remove(&mut self, whom: &[u8]) {
        let found = |user: &User| user.name == whom || user.id == whom;
        let slot = self
            .slots
            .iter_mut()
            .find(|slot| slot.as_ref().is_some_and(found));
        if let Some(slot) = slot {
            *slot = None;
        }
    }

    /// With all slots in use, a new user is dropped.
    fn add(&mut self, name: &[u8], id: &[u8]) {
        let name = &name[..name.len().min(NAME_MAX)];
        let id = &id[..id.len().min(ID_MAX)];
        let same = |user: &User| user.name == name || user.id == id;
        let known = self
            .slots
            .iter()
            .position(|slot| slot.as_ref().is_some_and(same));
        let slot = known.or_else(|| self.slots.iter().position(Option::is_none));
        if let Some(slot) = slot {
            self.slots[slot] = Some(User {
                name: name.to_vec(),
                id: id.to_vec(),
            });
        }
    }

    /// Its users as `name:id`, sorted.
    pub fn users(&self) -> Vec<String> {
        let text = |user: &User| {
            let (name, id) = (
                String::from_utf8_lossy(&user.name),
                String::from_utf8_lossy(&user.id),
            );
            format!("{name}:{id}")
        };
        let mut users: Vec<String> = self.slots.iter().flatten().map(text).collect();
        users.sort();
        users
    }

    /// The ids of its users as it writes them into `chat_ids`.
    pub fn chat_ids(&self) -> String {
        let users = self.slots.iter().flatten();
        let ids: Vec<_> = users
            .map(|user| String::from_utf8_lossy(&user.id))
            .collect();
        ids.join(",")
    }

    /// All that it knows, in one line: `i5;f1;Ada:1234567890`.
    pub fn knows(&self) -> String {
        let interval = self.interval.map(|minutes| format!("i{minutes}"));
        let feedback = self.feedback.map(|on| format!("f{}", u8::from(on)));
        let tokens: Vec<String> = interval
            .into_iter()
            .chain(feedback)
            .chain(self.users())
            .collect();
        tokens.join(";")
    }
}

fn starts_with_digit(bytes: &[u8]) -> bool {
    bytes.first().is_some_and(u8::is_ascii_digit)
}

/// As C's `atoi` reads it.
fn leading_number(bytes: &[u8]) -> u32 {
    let digits = bytes.iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |number, digit| {
        number
            .wrapping_mul(10)
            .wrapping_add(u32::from(digit - b'0'))
    })
}
