//! Finding out whether credentials are good, and searching: what is asked of a server as a whole.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};

use super::{
    Credentials, Endpoint, Registries, RegistryError, Session,
    client::{Outgoing, collect},
};
use crate::engine::image::asking::max_answer;

impl<'a> Session<'a> {
    /// Asks for the server's root as whoever the credentials are of. Answers the identity token that its token
    /// server gave for them, if it gave one.
    ///
    /// # Errors
    /// They are not good, or nobody answers.
    pub async fn login(
        registries: &'a Registries,
        endpoint: Endpoint,
        credentials: &Credentials,
    ) -> Result<Option<String>, RegistryError> {
        let session = Session::open(registries, endpoint, "", Some(credentials)).await?;
        session.get("", HeaderMap::new()).await?;
        Ok(session.identity_token())
    }
}

impl Registries {
    /// Searches the index at an endpoint (Docker's registry API v1, which is left for this alone). The answer is
    /// JSON, at most [`max_answer`] bytes of it.
    pub(in crate::engine::image) async fn search(
        &self,
        endpoint: &Endpoint,
        term: &str,
        limit: i64,
        credentials: Option<&Credentials>,
    ) -> Result<Bytes, RegistryError> {
        let Endpoint { scheme, authority, prefix, insecure, .. } = endpoint;
        let term = super::session::encode(term);
        let url = format!("{scheme}://{authority}{prefix}/v1/search?q={term}&n={limit}");
        let mut outgoing = Outgoing { retry: false, ..Outgoing::get(url, *insecure) };
        let basic = credentials.and_then(Credentials::basic);
        outgoing.authorization = basic.and_then(|value| HeaderValue::from_str(&value).ok());
        let client = self.client();
        let response = client.send(&outgoing).await?;
        if !response.status().is_success() {
            return Err(RegistryError::Status(response.status().as_u16().to_string()));
        }
        collect(response.into_body(), max_answer(), client.patience().idle).await.map_err(|problem| {
            RegistryError::Invalid(format!("the index' answer could not be read: {problem}"))
        })
    }
}
