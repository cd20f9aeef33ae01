//! The signed-in user of an Unleash server (`GET /api/admin/user`).

use serde::Deserialize;

/// An account of the server.
#[derive(Clone, Debug, Deserialize)]
pub struct User {
    /// The numeric id.
    pub id: i64,
    /// The name to sign in with.
    #[serde(default)]
    pub username: Option<String>,
    /// The email address.
    #[serde(default)]
    pub email: Option<String>,
}

#[derive(Deserialize)]
struct UserResponse {
    user: User,
}

impl User {
    /// Parses the response.
    pub fn parse(body: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(body).map(|UserResponse { user }| user)
    }

    /// The first of user name and email address that is not empty, or else the id.
    pub fn display_name(&self) -> String {
        let name = [&self.username, &self.email].into_iter().flatten().find(|it| !it.is_empty());
        name.cloned().unwrap_or_else(|| format!("account {}", self.id))
    }
}
