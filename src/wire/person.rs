//! Who has signed in at an Unleash server, as it tells (`GET /api/admin/user`).

use serde::Deserialize;

/// An account of the server.
#[derive(Clone, Debug, Deserialize)]
pub struct Person {
    /// Its number.
    pub id: i64,
    /// Its name, where it has one.
    #[serde(default)]
    pub username: Option<String>,
    /// Its address, where it has one.
    #[serde(default)]
    pub email: Option<String>,
}

#[derive(Deserialize)]
struct Answer {
    user: Person,
}

impl Person {
    /// Reads the answer.
    pub fn parse(body: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(body).map(|Answer { user }| user)
    }

    /// What it is called.
    pub fn name(&self) -> String {
        let name = [&self.username, &self.email].into_iter().flatten().find(|it| !it.is_empty());
        name.cloned().unwrap_or_else(|| format!("account {}", self.id))
    }
}
