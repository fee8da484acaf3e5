//! Operations that Docker has and Bulkhead has not: each says so in words, and lists that are truly empty
//! are empty.

use http::Response;
use serde_json::json;

use crate::{
    api::{
        request::Call,
        response::{Body, json as json_response},
        router::{Route, refuse, table},
    },
    engine::{Error, Result},
};

/// Handlers that refuse, by what the user wanted.
macro_rules! refusals {
    ($($name:ident => $what:literal),* $(,)?) => {
        $(async fn $name(_: Call) -> Result<Response<Body>> {
            Err(refuse($what))
        })*
    };
}

refusals! {
    build => "building images is",
    session => "BuildKit's sessions are",
    plugin => "plugins are",
}

pub(super) const ROUTES: &[Route] = table! {
    POST "/build" => build,
    POST "/build/prune" => build_prune,
    POST "/build/cancel" => build,
    POST "/session" => session,
    POST "/grpc" => session,
    GET "/plugins" => plugins,
    GET "/plugins/privileges" => plugin,
    POST "/plugins/pull" => plugin,
    POST "/plugins/create" => plugin,
    GET "/plugins/{name}/json" => no_plugin,
    DELETE "/plugins/{name}" => no_plugin,
    POST "/plugins/{name}/enable" => no_plugin,
    POST "/plugins/{name}/disable" => no_plugin,
    POST "/plugins/{name}/upgrade" => plugin,
    POST "/plugins/{name}/push" => plugin,
    POST "/plugins/{name}/set" => no_plugin,
    GET "/swarm" => swarm,
    GET "/swarm/unlockkey" => swarm,
    POST "/swarm/init" => swarm_control,
    POST "/swarm/join" => swarm_control,
    POST "/swarm/leave" => swarm,
    POST "/swarm/update" => swarm,
    POST "/swarm/unlock" => swarm,
    GET "/nodes" => swarm,
    GET "/nodes/{id}" => swarm,
    POST "/nodes/{id}/update" => swarm,
    DELETE "/nodes/{id}" => swarm,
    GET "/services" => swarm,
    POST "/services/create" => swarm,
    GET "/services/{id}" => swarm,
    POST "/services/{id}/update" => swarm,
    DELETE "/services/{id}" => swarm,
    GET "/services/{id}/logs" => swarm,
    GET "/tasks" => swarm,
    GET "/tasks/{id}" => swarm,
    GET "/tasks/{id}/logs" => swarm,
    GET "/secrets" => swarm,
    POST "/secrets/create" => swarm,
    GET "/secrets/{id}" => swarm,
    POST "/secrets/{id}/update" => swarm,
    DELETE "/secrets/{id}" => swarm,
    GET "/configs" => swarm,
    POST "/configs/create" => swarm,
    GET "/configs/{id}" => swarm,
    POST "/configs/{id}/update" => swarm,
    DELETE "/configs/{id}" => swarm,
};

/// There is no build cache; `docker system prune` asks for this, too.
async fn build_prune(_: Call) -> Result<Response<Body>> {
    json_response(&json!({ "CachesDeleted": null, "SpaceReclaimed": 0 }))
}

async fn plugins(call: Call) -> Result<Response<Body>> {
    call.filters(&["capability", "enabled"])?;
    json_response(&json!([]))
}

async fn no_plugin(call: Call) -> Result<Response<Body>> {
    Err(Error::not_found(format!("plugin {:?} not found", call.name())))
}

async fn swarm(_: Call) -> Result<Response<Body>> {
    Err(Error::unavailable(
        "This node is not a swarm manager. Use \"docker swarm init\" or \"docker swarm join\" to connect this node to \
         swarm and try again.",
    ))
}

async fn swarm_control(_: Call) -> Result<Response<Body>> {
    Err(refuse("swarm mode is"))
}
