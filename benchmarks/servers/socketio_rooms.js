// Rooms of Socket.IO: join one, say something to all in it.  node socketio_rooms.js PORT
const { createServer } = require("node:http");
const { Server } = require("socket.io");

const http = createServer((request, response) => response.writeHead(404).end()); // also for who asks whether it is there
const server = new Server(http, { perMessageDeflate: false, cors: { origin: "*" } });

server.on("connection", (socket) => {
  socket.on("join", (room, joined) => {
    socket.join(room);
    joined("joined");
  });
  socket.on("say", (room, message) => server.to(room).emit("said", message));
});

http.listen({ port: Number(process.argv[2]), host: "127.0.0.1", backlog: 4096 });
